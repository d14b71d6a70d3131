"""A classification head that trains whole: y = W x + b, with [W | b] as one dense factor that belongs to the adapter.

It is new with the task, so there is no base weight beneath it: its start is drawn from the seed, the same for all clients. As the other
trained factors it may carry leading axes (`fedsim.core.products`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim.core.forms import HEAD
from fedsim.core.products import affine


class HeadLinear(nn.Module):
    """A linear layer [out, in] whose weight and bias are the buffer `head` [out, in + 1]: `affine` sees an input of one for the bias."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.shape = (rows, columns)
        self.head: Tensor
        self.register_buffer(HEAD, torch.zeros(rows, columns + 1, device=base.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [rows, ..., in]
        return affine(torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1), None, chain=(self.head,))


def insert_heads(model: nn.Module, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Replaces the linear layers at `paths` by `HeadLinear` in place, and returns their (out, in)."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, HeadLinear(layer))
    return {path: layer.shape for path, layer in head_layers(model).items()}


def head_layers(model: nn.Module) -> dict[str, HeadLinear]:
    """Returns the layers of the head by path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HeadLinear)}

"""A fully trained classification head: y = W x + b, with [W | b] as one dense factor of the adapter.

It is new for the task and has no base weight: its start is drawn from the seed, the same for all clients. Like the other trained factors it
may have leading axes (`fedsim.core.products`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim.core.forms import HEAD
from fedsim.core.products import affine


class HeadLinear(nn.Module):
    """A linear layer [out, in] whose weight and bias are the buffer `head` [out, in + 1]; the bias gets a constant input of one."""

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

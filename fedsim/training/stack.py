"""Selects the rows of a stack [clients, parameters] for a pass and accumulates their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core.payload import Layout
from fedsim.types import Adapter

Place = slice | Tensor
"""Selects rows of a stack: a slice gives a view, an index tensor a copy."""


def place(slots: Sequence[int], device: torch.device) -> Place:
    """Returns the selector of the rows at `slots`, in this order: a slice if they are consecutive."""
    first, last = slots[0], slots[-1]
    if list(slots) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return on_device(torch.tensor(slots), device)


def accumulate(stack: Tensor, layout: Layout, where: Place, parts: Adapter) -> None:
    """Adds stacked factors [groups, ...], in the order of the layout, to the rows of the stack at `where`; a row may repeat."""
    if isinstance(where, slice):
        torch._foreach_add_(list(layout.unpack(stack[where]).values()), list(parts.values()))  # one call
    else:
        stack.index_add_(0, where, torch.cat([part.flatten(1) for part in parts.values()], dim=1))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device; copies to a GPU asynchronously, from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

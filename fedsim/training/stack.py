"""Rows of a stack [clients, parameters]: which of them a pass meets, and how their gradients come back to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.core.payload import Layout
from fedsim.types import Adapter

Place = slice | Tensor
"""What picks rows of a stack: a slice, which gives a view, or an index, which gives a copy."""


def place(slots: Sequence[int], device: torch.device) -> Place:
    """Returns what picks the rows at `slots`, in this order: a slice where they follow one another."""
    first, last = slots[0], slots[-1]
    if list(slots) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return on_device(torch.tensor(slots), device)


def accumulate(stack: Tensor, layout: Layout, where: Place, parts: Adapter) -> None:
    """Adds stacked factors [groups, ...], in the order of the layout, to the rows of the stack at `where`; a row may be named twice."""
    if isinstance(where, slice):
        torch._foreach_add_(list(layout.unpack(stack[where]).values()), list(parts.values()))  # one call
    else:
        stack.index_add_(0, where, torch.cat([part.flatten(1) for part in parts.values()], dim=1))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device; a GPU takes it from pinned memory, so that nothing waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""Products with a factor that rows share: all of them, those of a group, or those of a group with a gradient for each row.

A factor may carry leading axes. [groups, j, k]: the rows of the batch fall into as many equal, contiguous groups, and each group meets its
own factor. [groups, rows, j, k]: the same with one factor per row, so that its gradient is per example. Where that is an expanded view of
the groups' factors, nothing is copied: the product is taken by groups, and only the gradient is formed row by row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Returns `x @ factor.T` for each row of x: [rows, ..., k] -> [rows, ..., j].

    `factor` is [j, k], [groups, j, k] or [groups, rows of a group, j, k]. It is cast to the type of x, so that float32 factors serve a
    bfloat16 base model.
    """
    if factor.dim() == 4:
        return _of_rows(None, x, factor, 1.0)
    factor = factor.to(x.dtype)
    if factor.dim() == 2:
        return functional.linear(x, factor)
    return _split(torch.bmm(_grouped(x, len(factor)), factor.mT), x)


def add_product(y: Tensor, x: Tensor, factor: Tensor, scaling: float = 1.0) -> Tensor:
    """Returns `y + scaling * multiply(x, factor)`, in one pass over memory."""
    if factor.dim() == 4:
        return _of_rows(y, x, factor, scaling)
    factor = factor.to(x.dtype)
    if factor.dim() == 2:
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), factor.T, alpha=scaling).view_as(y)
    return torch.baddbmm(_grouped(y, len(factor)), _grouped(x, len(factor)), factor.mT, alpha=scaling).view_as(y)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Returns [groups, positions, k] of [rows, ..., k]."""
    return x.reshape(groups, -1, x.shape[-1])


def _split(product: Tensor, x: Tensor) -> Tensor:
    """Returns [rows, ..., j] of [groups, positions, j], as x is."""
    return product.view(*x.shape[:-1], product.shape[-1])


def _of_rows(y: Tensor | None, x: Tensor, factor: Tensor, scaling: float) -> Tensor:
    if factor.stride(1) == 0:
        return _RowsProduct.apply(y, x, factor, scaling)
    flat = factor.flatten(0, 1)
    return multiply(x, flat) if y is None else add_product(y, x, flat, scaling)


class _RowsProduct(torch.autograd.Function):
    """y + scaling * x @ factor.T by groups, with the gradient of the factor row by row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x: Tensor, factor: Tensor, scaling: float) -> Tensor:
        matrix = factor[:, 0].to(x.dtype)
        ctx.save_for_backward(x, matrix)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, factor.shape, factor.dtype
        grouped = _grouped(x, len(matrix))
        if y is None:
            return _split(torch.bmm(grouped, matrix.mT), x)
        return torch.baddbmm(_grouped(y, len(matrix)), grouped, matrix.mT, alpha=scaling).view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, matrix = ctx.saved_tensors
        of_x = of_factor = None
        if ctx.needs_input_grad[1]:
            of_x = _split(torch.bmm(_grouped(gradient, len(matrix)), matrix), x)
            of_x = of_x if ctx.scaling == 1.0 else of_x.mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            rows = ctx.shape[0] * ctx.shape[1]
            scaled = x if ctx.scaling == 1.0 else x * ctx.scaling
            of_factor = torch.bmm(_grouped(gradient, rows).mT, _grouped(scaled, rows)).view(ctx.shape).to(ctx.dtype)
        return gradient if ctx.needs_input_grad[0] else None, of_x, of_factor, None

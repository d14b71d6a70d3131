"""The product of an adapted layer, W x + b + s P x, as one autograd step. Rows may share the factors of P or have their own.

A factor may have leading axes. [groups, j, k]: the rows of the batch form as many equal, contiguous groups, and each group has its own
factor. [groups, rows, j, k]: the same with one factor per row, so that its gradient is per example. An expanded view of the groups' factors
is not copied: the product is taken by groups, and only the gradient is computed row by row.

With one step instead of one per matrix, the products themselves add up the two branches, forward and backward, and nothing unneeded (such
as gradients of frozen matrices) is recorded.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fedsim.core import gemm


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, chain: Sequence[Tensor] = (), scaling: float = 1.0) -> Tensor:
    """Returns W x + b + s P x for each row of x: [rows, ..., in] -> [rows, ..., out].

    P is the product of the factors in `chain`, from left to right, each [j, k], [groups, j, k] or [groups, rows of a group, j, k]. They
    are cast to the type of x, so that float32 factors fit a bfloat16 base model. `weight` [out, in] may be None if there is a chain;
    without it the bias is ignored. All but the bias have gradients.
    """
    result: Tensor = _Affine.apply(x, weight, bias, scaling, *chain)
    return result


class _Affine(torch.autograd.Function):
    """`affine`; saves the inputs of the chain's matrices in the order of the chain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scaling: float, *chain: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        matrices = [_matrix(factor, x.dtype) for factor in chain]
        inputs = [flat]
        for matrix in reversed(matrices[1:]):
            inputs.insert(0, _product(inputs[0], matrix))
        if scaling != 1.0:
            inputs[0] = inputs[0] * scaling
        y = None if weight is None else gemm.linear(flat, weight, bias)
        if matrices:
            y = _product(inputs[0], matrices[0], y)
        assert y is not None
        trained = ctx.needs_input_grad[4:]
        ctx.scaling, ctx.shape, ctx.factors = scaling, x.shape, [(factor.shape, factor.dtype) for factor in chain]
        ctx.save_for_backward(
            weight,
            flat if ctx.needs_input_grad[1] else None,
            *matrices,
            *(kept if needed else None for kept, needed in zip(inputs, trained, strict=False)),
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, flat, *saved = ctx.saved_tensors
        matrices, inputs = saved[: len(ctx.factors)], saved[len(ctx.factors) :]
        needs_grad_x, needs_grad_weight, _, _, *trained = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        grad_chain: list[Tensor | None] = [None] * len(matrices)
        z = g
        for place, (matrix, (shape, dtype)) in enumerate(zip(matrices, ctx.factors, strict=True)):
            if trained[place]:
                grad_chain[place] = _factor_gradient(z, inputs[place], shape).to(dtype)
            if place == 0 and ctx.scaling != 1.0:
                z = z * ctx.scaling
            if place < len(matrices) - 1 and (needs_grad_x or any(trained[place + 1 :])):
                z = _product(z, matrix.mT)
        grad_x = None
        if needs_grad_x:
            grad_x = None if weight is None else gemm.linear(g, weight.T)
            grad_x = (_product(z, matrices[-1].mT, grad_x) if matrices else grad_x).view(ctx.shape)  # type: ignore[union-attr]
        grad_weight = g.T @ flat if needs_grad_weight else None
        return grad_x, grad_weight, None, None, *grad_chain


def _matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the factor as [j, k] or [groups, j, k]; if each row has a different one, every row is a group."""
    if factor.dim() == 4:
        factor = factor[:, 0] if factor.stride(1) == 0 else factor.flatten(0, 1)
    return factor.to(dtype)


def _product(x: Tensor, matrix: Tensor, onto: Tensor | None = None) -> Tensor:
    """Returns x @ matrix.T, added to `onto` (which may be overwritten) if given: [tokens, k] -> [tokens, j]."""
    if matrix.dim() == 2:
        return gemm.linear(x, matrix, None, onto)
    groups, width = matrix.shape[:2]
    grouped = _grouped(x, groups)
    if onto is None:
        return torch.bmm(grouped, matrix.mT).view(-1, width)
    split = _grouped(onto, groups)
    torch.baddbmm(split, grouped, matrix.mT, out=split)
    return onto


def _factor_gradient(gradient: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the gradient of a factor of this shape from that of its product [tokens, j] and its input [tokens, k]."""
    if len(shape) == 2:
        return gradient.T @ x
    parts = prod(shape[:-2])
    return torch.bmm(_grouped(gradient, parts).mT, _grouped(x, parts)).view(shape)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Returns [groups, tokens of a group, k] of [tokens, k]."""
    return x.view(groups, -1, x.shape[-1])

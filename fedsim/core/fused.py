"""A decoder's operations between its products, each as one autograd step: the rotation of queries and keys, the gate, the norm.

The single steps of transformers' own code keep tensors that are not needed (the normalised input in float32, the gate after its activation:
together a third of what the backward pass of a bfloat16 block keeps) and go through memory about twice as often. Rotation and gate give the
same bits as before; the norm rounds once less, and is not replaced on a CPU, where it gains nothing.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTATION = "apply_rotary_pos_emb"
"""Name of the function in transformers' modules: (queries, keys, cos, sin, unsqueeze_dim=1) -> (queries, keys)."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-4}
"""Tolerance of the norm, which rounds differently, by the types in which parts are tested; the other parts are equal to the bit."""


def fuse(model: nn.Module) -> None:
    """Replaces parts of the model by fused ones that compute the same, as tested on small random inputs.

    Names and parameters stay. The rotation is a function in the Python module of the model and is replaced there, for all models of this
    kind in the process.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if GatedMLP.fits(child):
                setattr(parent, name, GatedMLP(child))
            elif not on_cpu and RMSNorm.fits(child):
                setattr(parent, name, RMSNorm(child))
    for module in {type(each).__module__ for each in model.modules()}:
        original = getattr(sys.modules.get(module), ROTATION, None)
        if original is not None and not isinstance(original, Rotation) and Rotation.fits(original):
            setattr(sys.modules[module], ROTATION, Rotation(original))


# ---- the gate


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama and its descendants (Shazeer 2020, arXiv 2002.05202)."""

    PARTS = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))
        return result

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module computes the same."""
        linear = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if isinstance(module, cls) or linear != set(cls.PARTS) or not _takes_one_argument(module):
            return False
        with _generator() as generator:
            small = _without_parameters(module)
            small._modules |= {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
            return all(_agree(small.to(dtype), cls(small), torch.randn(2, 3, 4, generator=generator).to(dtype)) for dtype in TOLERANCES)


class _Gate(torch.autograd.Function):
    """silu(a) * b; recomputes silu(a) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return functional.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad_b, grad_a = functional.silu(a).mul_(gradient), gradient * b
        return torch.ops.aten.silu_backward.grad_input(grad_a, a, grad_input=grad_a), grad_b  # in place: memory may be at its peak here


# ---- the norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), by PyTorch's kernel if the device has one."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = original.weight, original.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module computes the same, except for the order of additions."""
        named = [name for name, _ in module.named_parameters()] == ["weight"] and hasattr(module, "variance_epsilon")
        if isinstance(module, cls) or not named or not _takes_one_argument(module):
            return False
        with _generator() as generator:
            small = _without_parameters(module)
            small._parameters["weight"] = nn.Parameter(torch.randn(8, generator=generator))
            x = torch.randn(2, 3, 8, generator=generator)
            return all(_agree(small.to(dtype), cls(small), x.to(dtype), atol) for dtype, atol in TOLERANCES.items())


# ---- the rotation


class Rotation:
    """Rotates queries and keys by their positions (Su et al. 2021, arXiv 2104.09864), in place of transformers' function.

    Calls the original if only some dimensions rotate, types differ, `cos` needs a gradient or there are other arguments.
    """

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **others: Any) -> tuple[Tensor, Tensor]:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if others or cos.requires_grad or not whole or not q.dtype == k.dtype == cos.dtype:
            return self.original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **others)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)

    @classmethod
    def fits(cls, original: Callable[..., tuple[Tensor, Tensor]]) -> bool:
        """Whether a function computes the same."""
        fused = cls(original)
        with _generator() as generator:
            keys, (cos, sin) = torch.randn(2, 1, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
            queries = torch.randn(2, 3, 5, 8, generator=generator)
        for dtype in TOLERANCES:
            others = [tensor.to(dtype) for tensor in (keys, cos, sin)]
            rotations = [lambda x, rotate=rotate, others=others: torch.cat(rotate(x, *others), dim=1) for rotate in (original, fused)]
            if not _agree(rotations[0], rotations[1], queries.to(dtype)):
                return False
        return True


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin, x1 and x2 being the halves of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, dim=-1)
        return _rotated(x, cos, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        low, high = sin.neg().chunk(2, dim=-1)
        return _rotated(gradient, cos, high, low), None, None


def _rotated(x: Tensor, cos: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns x cos, minus x2 `low` in the first half and plus x1 `high` in the second."""
    y = x * cos
    (first, second), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    part = second * low
    y1.sub_(part)
    y2.add_(torch.mul(first, high, out=part))
    return y


# ---- comparing two implementations


@contextmanager
def _generator() -> Iterator[torch.Generator]:
    """Yields a CPU generator, and restores the global one, from which modules draw their weights."""
    with torch.random.fork_rng(devices=[]):
        yield torch.Generator().manual_seed(0)


def _without_parameters(module: nn.Module) -> Any:
    """Returns a copy of the module without its parameters, keeping only children that have none, such as an activation."""
    small = copy.copy(module)
    small._parameters = {}
    small._modules = {name: child for name, child in module.named_children() if next(child.parameters(), None) is None}
    return small


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and one more


def _agree(theirs: Callable[..., Any], ours: Callable[..., Any], x: Tensor, atol: float = 0.0) -> bool:
    """Whether results of one type and their gradients agree to `atol` (gradients to four times that); False if either fails."""
    found = []
    for function in (theirs, ours):
        try:
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            gradient = torch.autograd.grad(y.square().sum(), leaf, allow_unused=True)[0] if y.requires_grad else None
        except (TypeError, RuntimeError, AttributeError):
            return False
        found.append((y.detach(), torch.zeros_like(x) if gradient is None else gradient))
    (y, grad_x), (own_y, own_grad_x) = found
    same = y.dtype == own_y.dtype and torch.allclose(y, own_y, rtol=0, atol=atol)
    return same and torch.allclose(grad_x, own_grad_x, rtol=0, atol=4 * atol)

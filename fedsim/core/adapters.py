"""LoRA-SB adapters: y = W x + s B R A x, where only R trains (LoRA-SB, arXiv 2411.19557; Fed-SB, arXiv 2502.15436).

W, B and A are common to all clients, so a cohort of clients differs in R alone. A factor may therefore carry a leading
axis of groups: the rows of the batch fall into as many equal, contiguous groups, and each group meets its own factor.
One group is a single client, one group per client is a cohort, one group per row gives per-example gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import UserError, nearest
from fedsim.types import Adapter

DEFAULT_RANK = 64


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """Returns `x @ factor.T` for each row of x: [rows, ..., k] -> [rows, ..., j].

    `factor` is [j, k], or [groups, j, k] where rows is a multiple of groups and group g owns the g-th contiguous block of rows.
    It is cast to the type of x, so that float32 factors serve a bfloat16 base model.
    """
    factor = factor.to(x.dtype)
    if factor.dim() == 2:
        return functional.linear(x, factor)
    grouped = x.reshape(factor.shape[0], -1, x.shape[-1])
    return torch.bmm(grouped, factor.mT).view(*x.shape[:-1], factor.shape[1])


def add_product(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Returns `y + multiply(x, factor)`, in one pass over memory."""
    factor = factor.to(x.dtype)
    if factor.dim() == 2:
        return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), factor.T).view_as(y)
    groups = factor.shape[0]
    grouped, sums = x.reshape(groups, -1, x.shape[-1]), y.reshape(groups, -1, y.shape[-1])
    return torch.baddbmm(sums, grouped, factor.mT).view_as(y)


class LoRASBLinear(nn.Module):
    """A frozen linear layer W (out x in) with the low-rank update s B R A; B is out x r, R is r x r, A is r x in.

    The factors are buffers, not parameters: `bound` puts the tensors of one client or of a cohort in their place, whoever owns them.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float) -> None:
        super().__init__()
        out_features, in_features = weight_matrix(base).shape
        device = weight_matrix(base).device
        self.base = base
        self.scaling = scaling
        self.merged: Tensor | None = None  # W + s B R A, [out, in], while `merged` is in force
        self.B: Tensor
        self.R: Tensor
        self.A: Tensor
        self.register_buffer("B", torch.zeros(out_features, rank, device=device), persistent=False)
        self.register_buffer("R", torch.zeros(rank, rank, device=device), persistent=False)
        self.register_buffer("A", torch.zeros(rank, in_features, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return functional.linear(x, self.merged, self.base.bias)  # type: ignore[arg-type]
        return add_product(self.base(x), multiply(multiply(x, self.A), self.scaling * self.R), self.B)

    def update(self) -> Tensor:
        """Returns s B R A as float32 [out, in]."""
        return self.scaling * (self.B @ self.R @ self.A)


def weight_matrix(base: nn.Module) -> Tensor:
    """Returns the weight as [out, in]."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.T if is_transposed(base) else weight


def is_transposed(base: nn.Module) -> bool:
    """Whether the layer keeps its weight as [in, out], as GPT-2's Conv1D does."""
    return type(base).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer that can be adapted."""
    return type(module) is nn.Linear or is_transposed(module)


def adapt(model: nn.Module, rank: int | None, scaling: float, target_modules: list[str]) -> None:
    """Freezes the model and replaces its target layers by `LoRASBLinear`, in place.

    Targets are all linear layers inside the repeated blocks (heads, embeddings and poolers stay out), or those whose path
    ends with a name of `target_modules`. Without a rank it is `DEFAULT_RANK`, or the smallest side of a target where that is less.
    Raises UserError for a name that fits no layer and for a rank above a layer's size.
    """
    model.requires_grad_(False)
    names = _targets(model, target_modules)
    if rank is None:
        rank = min(DEFAULT_RANK, *(side for name in names for side in weight_matrix(model.get_submodule(name)).shape))
    for name in names:
        matrix = weight_matrix(model.get_submodule(name))
        if rank > min(matrix.shape):
            raise UserError(
                f"adapter.rank: expected at most {min(matrix.shape)}, the smaller side of {name!r} with shape {tuple(matrix.shape)}, "
                f"got {rank}; lower the rank or leave the layer out with adapter.target_modules."
            )
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRASBLinear(model.get_submodule(name), rank, scaling))


def _targets(model: nn.Module, target_modules: list[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    if not target_modules:
        return _inside_blocks(model, linear)
    chosen = [name for name in linear if any(name == target or name.endswith("." + target) for target in target_modules)]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in target_modules:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise UserError(
                f"adapter.target_modules: no linear layer is named {target!r}; this model has {', '.join(known)}.{nearest(target, known)}"
            )
    return chosen


def _inside_blocks(model: nn.Module, linear: list[str]) -> list[str]:
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in blocks if not any(name.startswith(other + ".") for other in blocks)]
    inside = [name for name in linear if any(name.startswith(block + ".") for block in outermost)]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            raise UserError(
                f"The model keeps fused expert weights ({name!r}, shape {tuple(parameter.shape)}), which have no adapter; "
                "name the layers to adapt in adapter.target_modules, for example q_proj,k_proj,v_proj,o_proj."
            )
    if not inside:
        raise UserError("Expected a model with linear layers inside repeated blocks, found none; name them in adapter.target_modules.")
    return inside


def adapted_layers(model: nn.Module) -> dict[str, LoRASBLinear]:
    """Returns the adapted layers by path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRASBLinear)}


def factors(model: nn.Module, kinds: tuple[str, ...]) -> Adapter:
    """Returns the model's present factors of the given kinds ("B", "R", "A") by name, in the model's order."""
    return {f"{name}.{kind}": getattr(layer, kind) for name, layer in adapted_layers(model).items() for kind in kinds}


def install(model: nn.Module, adapter: Adapter) -> None:
    """Puts the tensors of `adapter` in the place of the factors of the same name."""
    for name, tensor in adapter.items():
        path, _, kind = name.rpartition(".")
        setattr(model.get_submodule(path), kind, tensor)


@contextmanager
def bound(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Runs the block with `adapter` in place of the factors of the same name, and puts the old ones back.

    Forward and backward belong into one block: activation checkpointing calls the layers again in the backward pass.
    """
    before = {name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in adapter}
    install(model, adapter)
    try:
        yield
    finally:
        install(model, before)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Runs the block with every update folded into a dense weight, for inference at the speed of the base model.

    The base weights are not touched, so the state afterwards is bit for bit the one before. Costs one copy of the adapted weights.
    """
    layers = adapted_layers(model).values()
    try:
        for layer in layers:
            matrix = weight_matrix(layer.base)
            layer.merged = (matrix.float() + layer.update()).to(matrix.dtype)
        yield
    finally:
        for layer in layers:
            layer.merged = None

"""Adapted layers: y = W x + s P x, where P is the product of a form's factors (see `fedsim.core.forms`), such as B R A for LoRA-SB.

All clients share W and the frozen factors; only the trained factors differ. A factor may therefore have a leading group axis (see
`fedsim.core.products`): one group for a single client, one per client for a cohort, and one factor per row (an expanded view) for
per-example gradients.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedsim.core.forms import RAVAN, AdapterSpec, Factors, Form, product
from fedsim.core.heads import head_layers, insert_heads
from fedsim.core.products import affine
from fedsim.errors import UserError, nearest
from fedsim.types import Adapter

DEFAULT_RANK = 64


class AdaptedLinear(nn.Module):
    """A frozen linear layer W [out, in] with the update of a form.

    The factors are buffers named by their kind, not parameters, so that `bound` can swap in the tensors of a client or a cohort.
    """

    def __init__(self, base: nn.Module, form: Form, rank: int, heads: int, scaling: float) -> None:
        super().__init__()
        matrix = weight_matrix(base)
        self.base = base
        self.form = form
        self.scaling = scaling
        self.merged: Tensor | None = None  # replaces W and its update within `merged` or `unadapted`
        self.folded: Tensor | None = None  # the update given to `fold`
        self.original: Tensor | None = None  # W before `fold`, if `fold` changed it
        self.beside: Tensor | None = None  # the folded update, in the type of W, if W has low precision
        self.shapes = form.shapes(*matrix_shape(base), rank, heads)
        for kind, shape in self.shapes.items():
            self.register_buffer(kind, torch.zeros(shape, device=matrix.device), persistent=False)

    @property
    def factors(self) -> Factors:
        """The layer's current factors by kind."""
        return {kind: getattr(self, kind) for kind in self.shapes}

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if self.merged is not None:
            y = affine(x, self.merged, bias)
        else:
            y = affine(x, weight_matrix(self.base), bias, self.form.chain(self.factors), self.scaling)
        return y if self.beside is None else y + affine(x, self.beside)

    def weight(self) -> Tensor:
        """Returns W [out, in], including the folded update."""
        matrix = weight_matrix(self.base)
        return matrix if self.beside is None or self.folded is None else matrix.float() + self.folded.to(matrix.device)

    def update(self) -> Tensor:
        """Returns the update as float32 [out, in]."""
        return product(self.form, self.factors, self.scaling)

    def fold(self, update: Tensor | None) -> None:
        """Makes the layer compute with W + update [out, in], where W is the loaded weight; None restores W.

        A bfloat16 or float16 W stays unchanged and the update is kept separately: a sum would lose whatever is below half of the last digit
        of an entry of W, which is nearly all of a small update.
        """
        matrix = weight_matrix(self.base)
        self.folded = update
        if _is_low_precision(matrix):
            self.beside = None if update is None else update.to(matrix.device, matrix.dtype)
            return
        if self.original is None:
            self.original = matrix.clone()
        if update is None:
            matrix.copy_(self.original)
            self.original = None
        else:
            matrix.copy_(self.original + update.to(matrix.device))


class FrozenLinear(nn.Linear):
    """A linear layer of the base model without an adapter, such as the output layer; it uses the same fast product as the others."""

    is_last: bool | None = None  # of a head: whether the model returns its result unchanged, None until checked
    _captured: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._captured is None:
            return affine(x, self.weight, self.bias)
        self._captured.append(x)
        return x

    @contextmanager
    def bypassed(self) -> Iterator[list[Tensor]]:
        """Makes the layer return its input unchanged within the block; yields the list of inputs it receives."""
        self._captured = []
        try:
            yield self._captured
        finally:
            self._captured = None


def _is_low_precision(matrix: Tensor) -> bool:
    """Whether adding a small update would round it away."""
    return matrix.dtype in (torch.bfloat16, torch.float16)


def weight_matrix(base: nn.Module) -> Tensor:
    """Returns the weight as [out, in]."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.T if is_transposed(base) else weight


def is_transposed(base: nn.Module) -> bool:
    """Whether the layer keeps its weight as [in, out], as GPT-2's Conv1D does."""
    return type(base).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer that can be adapted."""
    return type(module) in (nn.Linear, FrozenLinear) or is_transposed(module)


def adapt(
    model: nn.Module,
    form: Form,
    rank: int | None,
    heads: int,
    scaling: float,
    target_modules: list[str],
    classification_head: Sequence[str] = (),
) -> AdapterSpec:
    """Freezes the model, replaces its target layers by `AdaptedLinear` in place, and returns their spec.

    The layers of a classification head, given by path, are not targets: they become `HeadLinear`.

    Targets are all linear layers inside the repeated blocks (not heads, embeddings and poolers), or those whose path ends with a name
    of `target_modules`. Raises UserError for a name that matches no layer, a shared weight, and a rank above a layer's size.
    """
    model.requires_grad_(False)
    head = insert_heads(model, classification_head)
    layers = {name: matrix_shape(model.get_submodule(name)) for name in target_layers(model, target_modules)}
    _refuse_tied(model, layers)
    spec = adapter_spec(layers, form, rank, heads, scaling, head)
    for name in spec.layers:
        parent, _, child = name.rpartition(".")
        layer = AdaptedLinear(model.get_submodule(name), form, spec.rank, spec.heads, spec.scaling)
        setattr(model.get_submodule(parent), child, layer)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
    _SITES.pop(model, None)
    return spec


def adapter_spec(
    layers: dict[str, tuple[int, int]],
    form: Form,
    rank: int | None,
    heads: int,
    scaling: float,
    head: dict[str, tuple[int, int]] | None = None,
) -> AdapterSpec:
    """Returns the spec of adapters for layers of these shapes (out, in), with a classification head of layers of the shapes in `head`.

    `heads` is used by RAVAN only. Raises as `fitting_rank`.
    """
    heads = heads if form is RAVAN else 1
    return AdapterSpec(form, layers, fitting_rank(form, rank, heads, layers), heads, scaling if form.low_rank else 1.0, head or {})


def _refuse_tied(model: nn.Module, layers: Iterable[str]) -> None:
    """Raises UserError for a layer that shares its weight with another module, which an update would change too."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for layer in layers:
        shared = names[id(model.get_submodule(layer).weight)]
        if len(shared) > 1:
            raise UserError(
                f"adapter.target_modules: {layer!r} shares its weight ({', '.join(shared)}), an update would change both; leave it out."
            )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """Returns (out, in) of a linear layer."""
    out_features, in_features = weight_matrix(base).shape
    return out_features, in_features


def fitting_rank(form: Form, rank: int | None, heads: int, shapes: dict[str, tuple[int, int]]) -> int:
    """Returns the rank; the default is `DEFAULT_RANK` or the smallest side of a layer, if that is less, divided by `heads`.

    Raises UserError if a low-rank form has rank x heads above the smaller side of a layer.
    """
    smallest = min((min(shape) for shape in shapes.values()), default=heads)
    if form.low_rank and heads > smallest:
        raise UserError(f"method.heads: expected at most {smallest}, the smallest side of a layer, got {heads}.")
    if rank is None:
        return max(1, min(DEFAULT_RANK, *(side for shape in shapes.values() for side in shape)) // heads)
    for name, shape in shapes.items():
        if form.low_rank and rank * heads > min(shape):
            times = f" x {heads} heads" if heads > 1 else ""
            raise UserError(
                f"adapter.rank: expected at most {min(shape) // heads}, as {name!r} has shape {shape}, "
                f"got {rank}{times}; lower it (or the largest of federation.ranks), or leave the layer out with adapter.target_modules."
            )
    return rank


def target_layers(model: nn.Module, target_modules: list[str], head: Sequence[str] = ()) -> list[str]:
    """Returns the paths of the layers to adapt, without those of `head`. Raises UserError if there is none or a name matches none."""
    linear = [name for name, module in model.named_modules() if is_linear(module) and name not in head]
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


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Returns the adapted layers by path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def base_weights(model: nn.Module) -> Adapter:
    """Returns the current base weight [out, in] of every adapted layer, including the folded update."""
    return {name: layer.weight() for name, layer in adapted_layers(model).items()}


def factors(model: nn.Module, kinds: Sequence[str]) -> Adapter:
    """Returns the model's current factors of the given kinds by name, in the model's order, with those of a head last."""
    return {name: buffers[kind] for name, (buffers, kind) in _sites(model).items() if kind in kinds}


Site = tuple[Adapter, str]
"""Location of a factor: the buffers of its layer, and its kind."""

_SITES: WeakKeyDictionary[nn.Module, dict[str, Site]] = WeakKeyDictionary()


def _sites(model: nn.Module) -> dict[str, Site]:
    """Returns the sites of all factors by name, cached because every pass installs factors."""
    if model not in _SITES:
        layers = adapted_layers(model) | head_layers(model)
        buffers = {name: cast(Adapter, layer._buffers) for name, layer in layers.items()}
        _SITES[model] = {f"{name}.{kind}": (own, kind) for name, own in buffers.items() for kind in own}
    return _SITES[model]


def install(model: nn.Module, adapter: Adapter) -> None:
    """Replaces the factors named in `adapter` by its tensors."""
    sites = _sites(model)
    for name, tensor in adapter.items():
        buffers, kind = sites[name]
        buffers[kind] = tensor


@contextmanager
def bound(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Replaces the factors named in `adapter` within the block, then restores the old ones.

    Forward and backward must be in one block: activation checkpointing calls the layers again in the backward pass.
    """
    sites = _sites(model)
    before = {name: buffers[kind] for name, (buffers, kind) in ((name, sites[name]) for name in adapter)}
    install(model, adapter)
    try:
        yield
    finally:
        install(model, before)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Runs the block with every update merged into a dense weight, for inference at the speed of the base model.

    The base weights are not modified, so the state afterwards is bit for bit the same. Costs one copy of the adapted weights. Updates of
    bfloat16 and float16 weights are not merged: rounding would lose most of a small update and so evaluate a different model.
    """
    precise = {name: layer for name, layer in adapted_layers(model).items() if not _is_low_precision(weight_matrix(layer.base))}
    with _weights_replaced(precise, lambda layer: weight_matrix(layer.base) + layer.update()):
        yield


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """Runs the block with the base weights alone, without the factors' updates."""

    def base_weight(layer: AdaptedLinear) -> Tensor:
        matrix = weight_matrix(layer.base)
        return matrix.view_as(matrix)  # a view, since nn.Module would register the parameter a second time

    with _weights_replaced(adapted_layers(model), base_weight):
        yield


@contextmanager
def _weights_replaced(layers: dict[str, AdaptedLinear], weight: Callable[[AdaptedLinear], Tensor]) -> Iterator[None]:
    try:
        for layer in layers.values():
            layer.merged = weight(layer)
        yield
    finally:
        for layer in layers.values():
            layer.merged = None

"""The peak memory of a training pass, from shapes alone: for `fedsim estimate`, and to choose how many tokens share a pass.

A frozen layer keeps nothing for the backward pass. Kept are the inputs of norms, what attention and activations need, the inputs of
trained factors, and all factors in the type of the base. Kernel workspaces and gaps between tensors are not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, empty, nn

from fedsim.core.adapters import is_linear, matrix_shape
from fedsim.core.forms import AdapterSpec
from fedsim.core.fused import GatedMLP, RMSNorm
from fedsim.core.head_loss import logit_bytes, returns_raw_logits

FACTOR_BYTES = 4
"""Size of a trained parameter, and of its gradient."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes on which the cost of a base model depends."""

    parameters: int  # all of them, tied ones once
    block_parameters: int  # of the linear layers that every token goes through
    head_parameters: int  # of the output layer, which tokens with a loss go through; 0 without one
    layers: int
    attention_width: int  # heads x size of a head
    key_value_width: int  # key-value heads x size of a head
    hidden: int
    inner: int  # width between the two linear layers after attention
    vocabulary: int
    weight_bytes: int  # of one base weight
    norm_bytes: int  # per token, kept by the norms of a block for the backward pass
    kept_by_gate: int  # tensors of inner width that a block keeps for the backward pass
    score_bytes: int  # per pair of tokens, kept by the attention of a block; 0 if attention is fused
    loss_in_parts: bool  # whether logits are computed for some tokens at a time

    def block_bytes(self, length: float) -> float:
        """Returns the bytes that a block keeps per token in a row of this length; its attention keeps queries, keys, values and result."""
        keys = self.attention_width if self.score_bytes else self.key_value_width  # unfused attention repeats keys for each head
        kept = 2 * self.attention_width + 2 * keys + self.kept_by_gate * self.inner
        return self.norm_bytes + self.weight_bytes * kept + self.score_bytes * length

    def backward_bytes(self, length: float) -> float:
        """Returns the peak bytes of a token's gradients in the backward pass of a block: at the activation, or at the scores."""
        return max(self.weight_bytes * (2 * self.hidden + (self.kept_by_gate + 1) * self.inner), 2 * self.score_bytes * length)

    @property
    def cache_bytes(self) -> int:
        """Bytes per token: keys and values of all blocks."""
        return 2 * self.weight_bytes * self.layers * self.key_value_width

    @property
    def answer_bytes(self) -> int:
        """Approximate bytes per token of a generation batch: the cache, and the inputs and outputs of one block's layers."""
        made = 2 * (self.attention_width + self.key_value_width) + 7 * self.hidden + 3 * self.inner
        return self.cache_bytes + self.weight_bytes * made


def shape_of(model: Any, weight_bytes: int | None = None, attention: str | None = None) -> ModelShape:
    """Returns the shape of a language model or an encoder of transformers, adapted or not, on any device.

    `weight_bytes`, the size of a weight, and `attention`, the name of its implementation, override those of the model.
    """
    settings, output = model.config, model.get_output_embeddings()
    size = weight_bytes or next(model.parameters()).element_size()
    heads, hidden, layers = settings.num_attention_heads, settings.hidden_size, settings.num_hidden_layers
    width = getattr(settings, "head_dim", None) or hidden // heads
    queries, keys = heads * width, (getattr(settings, "num_key_value_heads", None) or heads) * width
    parts = [*max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len).modules()]
    linear = [matrix_shape(part) for part in parts if is_linear(part)]
    inner = max(columns for _, columns in linear)
    in_one_step = any(isinstance(part, nn.LayerNorm) or _is(RMSNorm)(part) for part in parts)  # else the input is cast to float32 first
    made = sum(rows for rows, _ in linear) / layers - queries - 2 * keys - 2 * hidden  # the activation's input, and what it gates
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block_parameters=sum(rows * columns for rows, columns in linear),
        head_parameters=0 if output is None else sum(parameter.numel() for parameter in output.parameters() if parameter.dim() == 2),
        layers=layers,
        attention_width=queries,
        key_value_width=keys,
        hidden=hidden,
        inner=inner,
        vocabulary=settings.vocab_size,
        weight_bytes=size,
        norm_bytes=sum(_norm_width(part, hidden, queries) for part in parts) // layers * (size if in_one_step else 4),
        kept_by_gate=2 if any(map(_is(GatedMLP), parts)) else _kept_by_activation(parts) + (2 if made > 1.5 * inner else 0),
        score_bytes=_score_bytes(settings, attention or settings._attn_implementation, heads, size),
        loss_in_parts=output is not None and is_linear(output) and returns_raw_logits(settings),
    )


def _is(fused: type[GatedMLP] | type[RMSNorm]) -> Callable[[nn.Module], bool]:
    return lambda part: isinstance(part, fused) or fused.fits(part)


def _norm_width(part: nn.Module, hidden: int, queries: int) -> int:
    """Returns the width of a norm's input per token; 0 for another module."""
    weight = part._parameters.get("weight")
    if weight is None or weight.dim() != 1:
        return 0
    return hidden if len(weight) >= hidden else queries  # a norm per head


def _kept_by_activation(parts: Sequence[nn.Module]) -> int:
    """Returns how many numbers the activation keeps per input number, measured on a small input; 1 if it is no module."""
    activations = [child for part in parts for name, child in part.named_children() if "act" in name and not [*child.parameters()]]
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.ones(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for activation in activations[:1]:
            activation(x)
    return max(1, sum(tensor.numel() for tensor in kept.values()) // len(x))


def _score_bytes(settings: Any, attention: str, heads: int, size: int) -> int:
    """Returns the bytes that unfused attention keeps per pair of tokens: the float32 softmax, its copy in the type of values, a tanh."""
    if attention != "eager":
        return 0
    copy = size if size < 4 else 0
    capped = size if getattr(settings, "attn_logit_softcapping", None) else 0
    return heads * (4 + copy + capped)


@dataclass(frozen=True)
class _Adapters:
    """The numbers that all adapters hold in a pass."""

    inputs: int  # per token, kept for the gradients of trained factors
    frozen: int  # in frozen factors
    own: int  # in trained factors, per group of rows


def _adapters(spec: AdapterSpec, trained: Sequence[str]) -> _Adapters:
    """Counts the input of layers once for all layers of a module that share it."""
    inputs = frozen = own = 0
    whole = set()
    for layer in spec.layers:
        shapes = spec.shapes(layer)
        factors = {kind: empty((1, *shape) if kind in trained else shape, device="meta") for kind, shape in shapes.items()}
        chain = spec.form.chain(factors)
        for matrix in chain:
            if matrix.dim() == 2:
                frozen += matrix.numel()
                continue
            own += matrix.numel()
            if matrix is chain[-1]:
                whole.add((layer.rpartition(".")[0], matrix.shape[-1]))
            else:
                inputs += matrix.shape[-1]
    return _Adapters(inputs + sum(width for _, width in whole), frozen, own)


def kept_bytes(shape: ModelShape, spec: AdapterSpec, trained: Sequence[str], tokens: float, *, length: float, groups: float = 1.0) -> float:
    """Returns the bytes that the forward pass of all blocks keeps for the backward pass; arguments as for `pass_bytes`."""
    adapters, number = _adapters(spec, trained), shape.weight_bytes
    cast = 0.0 if number == FACTOR_BYTES else number * (adapters.frozen + groups * adapters.own)  # factors in the type of the base
    return tokens * (shape.layers * shape.block_bytes(length) + number * adapters.inputs) + cast


def pass_bytes(
    shape: ModelShape,
    spec: AdapterSpec,
    trained: Sequence[str],
    tokens: float,
    *,
    length: float,
    groups: float = 1.0,
    targets: float | None = None,
    checkpointing: bool = False,
) -> float:
    """Returns the peak bytes of a pass of `tokens` positions in rows of `length`, besides model, bases and the clients' stacks.

    The rows form `groups`, each with its own factors and gradients: one per client's batch, or with DP-SGD one per row. `targets` positions
    have logits, by default all. The peak is at the start of the backward pass (at the loss or in the last block) or at its end, with all
    gradients (in the first block or while they are added to the stacks).
    """
    kept = kept_bytes(shape, spec, trained, tokens, length=length, groups=groups)
    loss, backward = _loss_bytes(shape, tokens, tokens if targets is None else targets), tokens * shape.backward_bytes(length)
    block = kept / shape.layers + backward
    inputs = tokens * shape.weight_bytes * shape.layers * shape.hidden
    at_first = inputs + max(loss, block) if checkpointing else kept + max(loss, backward)
    of_groups = FACTOR_BYTES * spec.num_parameters(trained) * groups
    picked = of_groups if groups > 1 else 0.0  # copies from the stacks; gradients summed and concatenated for them; a view for one group
    at_last = of_groups + max(block, 2 * picked)
    return picked + max(at_first, at_last)


def _loss_bytes(shape: ModelShape, tokens: float, targets: float) -> float:
    """Returns the bytes of the last norm's input, output and gradient, and of the logits; for a classifier 0, as they are few."""
    if not shape.head_parameters:
        return 0.0
    around = shape.weight_bytes * shape.hidden * (tokens + 2 * targets)
    whole = 0.0 if shape.loss_in_parts else shape.weight_bytes * targets * shape.vocabulary  # for the model's own use of them
    return around + whole + logit_bytes(targets, shape.vocabulary, in_parts=shape.loss_in_parts)

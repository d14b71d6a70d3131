"""Gradients of the base weights themselves, from which LoRA-SB derives its bases, and of single examples, which an audit looks for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.core.adapters import adapted_layers, is_transposed, unadapted
from fedsim.core.payload import Layout
from fedsim.training.batches import collate, pack
from fedsim.training.loss import group_gradients, row_losses
from fedsim.types import Adapter, AnyEncoded


def weight_gradients(model: nn.Module, examples: Sequence[AnyEncoded], *, pad_id: int, tokens_per_pass: int) -> Adapter:
    """Returns {layer: [out, in]}: the gradient of the sum of the examples' losses with respect to each adapted base weight.

    Taken at the base weights alone, without any update. float32 on the model's device; the frozen state of the model is restored. An empty
    sequence gives zeros.
    """
    layers = adapted_layers(model)
    with _trained_weights(model) as weights:
        sums = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
        for each in pack({0: list(examples)}, len(examples), tokens_per_pass) if examples else ():
            batch = collate([row.example for row in each.rows], pad_id, next(model.parameters()).device)
            with unadapted(model):
                gradients = torch.autograd.grad(row_losses(model, batch).sum(), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)
    return {
        name: total.T.contiguous() if is_transposed(layer.base) else total
        for (name, layer), total in zip(layers.items(), sums, strict=True)
    }


def clipped_weight_gradients(model: nn.Module, examples: Sequence[AnyEncoded], clip_norm: float, *, pad_id: int) -> Adapter:
    """Returns {layer: [out, in]}: the sum of the examples' gradients, each scaled to an L2 norm over all layers of at most `clip_norm`.

    One example changes the result by at most `clip_norm`, whatever the others are. One backward pass per example.
    """
    total = weight_gradients(model, [], pad_id=pad_id, tokens_per_pass=1)
    for example in examples:
        gradients = weight_gradients(model, [example], pad_id=pad_id, tokens_per_pass=example.num_tokens)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            total[name].add_(gradient * factor)
    return total


def factor_gradients(model: nn.Module, start: Tensor, layout: Layout, examples: Sequence[AnyEncoded], *, pad_id: int) -> Tensor:
    """Returns the gradient of every example's loss with respect to the flat factors `start` [parameters]: [examples, parameters]."""
    batch = collate(examples, pad_id, next(model.parameters()).device)
    weights = torch.ones(len(examples), device=start.device)
    _, parts = group_gradients(model, layout.unpack(start.expand(len(examples), -1)), batch, weights)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


@dataclass(frozen=True)
class FactoredGradients:
    """The weight gradients of single examples in one layer, as the sums over tokens that they are: G_i = sum over t of d_it x_it^T.

    An example of few tokens has a gradient of low rank, so that products with it need no matrix of the weight's size.
    """

    deltas: Tensor  # [examples, tokens, out]: gradients of the examples' losses at the layer's output
    inputs: Tensor  # [examples, tokens, in]

    def gram(self) -> Tensor:
        """Returns the inner products <G_i, G_j>: [examples, examples]."""
        count, tokens, _ = self.deltas.shape
        flat = (self.deltas.flatten(0, 1) @ self.deltas.flatten(0, 1).T) * (self.inputs.flatten(0, 1) @ self.inputs.flatten(0, 1).T)
        return flat.view(count, tokens, count, tokens).sum((1, 3))

    def along(self, matrix: Tensor) -> Tensor:
        """Returns the inner products <G_i, matrix> with [out, in]: [examples]."""
        return ((self.deltas @ matrix) * self.inputs).sum((1, 2))

    def squared_norms(self) -> Tensor:
        """Returns the diagonal of `gram`, in time that grows with the number of examples only."""
        return ((self.deltas @ self.deltas.mT) * (self.inputs @ self.inputs.mT)).sum((1, 2))

    def within(self, left: Tensor, right: Tensor) -> "FactoredGradients":
        """Returns left^T G_i right^T, for bases [out, rank] and [rank, in]."""
        return FactoredGradients(self.deltas @ left, self.inputs @ right.T)


def example_gradients(model: nn.Module, examples: Sequence[AnyEncoded], *, pad_id: int) -> dict[str, FactoredGradients]:
    """Returns the weight gradient of every example by layer, at the base weights alone; one backward pass for all of them."""
    layers, seen = adapted_layers(model), {}

    def keep(name: str, found: Tensor, output: Tensor) -> None:
        seen[name] = (found.detach(), output)

    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: keep(name, args[0], output)) for name, layer in layers.items()
    ]
    try:
        with _trained_weights(model), unadapted(model):
            losses = row_losses(model, collate(examples, pad_id, next(model.parameters()).device))
            deltas = torch.autograd.grad(losses.sum(), [output for _, output in seen.values()])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: FactoredGradients(delta.float(), seen[name][0].float()) for name, delta in zip(seen, deltas, strict=True)}


@contextmanager
def _trained_weights(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Lets the adapted base weights take gradients within the block."""
    layers = adapted_layers(model).values()
    weights = [parameter for layer in layers for name, parameter in layer.base.named_parameters() if name == "weight"]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)

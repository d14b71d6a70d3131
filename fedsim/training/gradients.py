"""Gradients of the base weights, from which LoRA-SB derives its bases, and of single examples, which an audit looks for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.core import gemm
from fedsim.core.adapters import adapted_layers, matrix_shape, unadapted, weight_matrix
from fedsim.core.gradient_parts import WHOLE, GradientParts
from fedsim.core.payload import Layout
from fedsim.training.batches import collate, pack
from fedsim.training.loss import batch_loss, group_gradients
from fedsim.types import Adapter, AnyEncoded


def weight_gradients(
    model: nn.Module, examples: Sequence[AnyEncoded], *, pad_id: int, tokens_per_pass: int, parts: GradientParts = WHOLE
) -> Adapter:
    """Returns the gradient of the sum of the examples' losses with respect to each adapted base weight, in its `parts`.

    Taken at the base weights without any update, and summed layer by layer in the backward pass. float32 on the model's device. An empty
    sequence gives zeros.
    """
    sums: Adapter = {}
    for name, layer in adapted_layers(model).items():
        deltas, inputs = (torch.zeros(0, side, device=weight_matrix(layer.base).device) for side in matrix_shape(layer.base))
        sums |= {part: gemm.weight_gradient(left, right) for part, left, right in parts.factored(name, deltas, inputs)}

    def add(name: str, deltas: Tensor, inputs: Tensor) -> None:
        for part, left, right in parts.factored(name, deltas.flatten(0, -2), inputs.flatten(0, -2)):
            sums[part].add_(gemm.weight_gradient(left, right))

    for each in pack({0: list(examples)}, len(examples), tokens_per_pass) if examples else ():
        batch = collate([row.example for row in each.rows], pad_id, next(model.parameters()).device)
        with unadapted(model), _hooked(model, add):
            batch_loss(model, batch)[0].backward()
    return sums


def clipped_weight_gradients(
    model: nn.Module, examples: Sequence[AnyEncoded], clip_norm: float, *, pad_id: int, tokens_per_pass: int, parts: GradientParts = WHOLE
) -> Adapter:
    """Returns the sum of the examples' gradients in their `parts`, each scaled to an L2 norm over all parts of at most `clip_norm`.

    One example changes the result by at most `clip_norm`, whatever the others are. A token takes about twice the memory of
    `weight_gradients`: the factors of the gradients are kept until the norms are known.
    """
    total = weight_gradients(model, [], pad_id=pad_id, tokens_per_pass=1, parts=parts)
    for each in pack({0: list(examples)}, len(examples), tokens_per_pass) if examples else ():
        gradients = example_gradients(model, [row.example for row in each.rows], pad_id=pad_id, parts=parts)
        norms = torch.stack([of_part.squared_norms() for of_part in gradients.values()]).sum(0).sqrt()  # of each example
        factors = clip_factors(norms, clip_norm)
        for name, of_part in gradients.items():
            finite_parts = FactoredGradients(*finite_rows((of_part.deltas, of_part.inputs), norms))
            total[name].add_(finite_parts.sum(factors))
    return total


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns the factors that scale gradients of these norms to at most `clip_norm`, 0 if not finite; the 1e-6 is Opacus's."""
    return torch.where(norms.isfinite(), (clip_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)


def finite_rows(parts: Iterable[Tensor], norms: Tensor) -> list[Tensor]:
    """Returns the parts [*norms.shape, ...] with zeros for each example whose norm is not finite: no factor would bound what it adds."""
    finite = norms.isfinite()
    if bool(finite.all()):
        return list(parts)
    return [part.where(finite.view(*finite.shape, *(1 for _ in part.shape[finite.dim() :])), 0.0) for part in parts]


def factor_gradients(model: nn.Module, start: Tensor, layout: Layout, examples: Sequence[AnyEncoded], *, pad_id: int) -> Tensor:
    """Returns the gradient of every example's loss with respect to the flat factors `start` [parameters]: [examples, parameters]."""
    batch = collate(examples, pad_id, next(model.parameters()).device)
    weights = torch.ones(len(examples), device=start.device)
    _, parts = group_gradients(model, layout.unpack(start.expand(len(examples), -1)), batch, weights)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


@dataclass(frozen=True)
class FactoredGradients:
    """The weight gradients of single examples in one layer, kept as factors of a sum over tokens: G_i = sum over t of d_it x_it^T.

    An example of few tokens has a gradient of low rank, so products with it need no matrix of the weight's size.
    """

    deltas: Tensor  # [examples, tokens, out]: gradients of the examples' losses at the layer's output
    inputs: Tensor  # [examples, tokens, in]

    def beside(self, deltas: Tensor, inputs: Tensor) -> "FactoredGradients":
        """Returns the gradients summed over these tokens and further tokens of the same examples."""
        return FactoredGradients(torch.cat([self.deltas, deltas], dim=1), torch.cat([self.inputs, inputs], dim=1))

    def gram(self) -> Tensor:
        """Returns the inner products <G_i, G_j>: [examples, examples]."""
        count, tokens, _ = self.deltas.shape
        flat = (self.deltas.flatten(0, 1) @ self.deltas.flatten(0, 1).T) * (self.inputs.flatten(0, 1) @ self.inputs.flatten(0, 1).T)
        return flat.view(count, tokens, count, tokens).sum((1, 3))

    def along(self, matrix: Tensor) -> Tensor:
        """Returns the inner products <G_i, matrix> with a matrix [out, in]: [examples]."""
        return ((self.deltas @ matrix) * self.inputs).sum((1, 2))

    def squared_norms(self) -> Tensor:
        """Returns the diagonal of `gram`, in time linear in the number of examples: [examples].

        In float64: large gradients of tokens may sum to a small one, which their rounding errors would swamp.
        """
        deltas, inputs = self.deltas.double(), self.inputs.double()
        return ((deltas @ deltas.mT) * (inputs @ inputs.mT)).sum((1, 2)).clamp(min=0).float()

    def sum(self, weights: Tensor) -> Tensor:
        """Returns the sum of the gradients times their `weights` [examples]: [out, in]."""
        return (self.deltas * weights[:, None, None]).flatten(0, 1).T @ self.inputs.flatten(0, 1)

    def within(self, left: Tensor, right: Tensor) -> "FactoredGradients":
        """Returns left^T G_i right^T, for bases [out, rank] and [rank, in]."""
        return FactoredGradients(self.deltas @ left, self.inputs @ right.T)


def example_gradients(
    model: nn.Module, examples: Sequence[AnyEncoded], *, pad_id: int, parts: GradientParts = WHOLE
) -> dict[str, FactoredGradients]:
    """Returns the weight gradient of every example, in its `parts`, at the base weights without any update; one backward pass for all.

    All inputs of an example to a layer count: both texts of a pair that are read apart, or a row without a token axis.
    """
    seen: dict[str, FactoredGradients] = {}

    def keep(name: str, deltas: Tensor, inputs: Tensor) -> None:
        of_examples = (each.reshape(len(examples), -1, each.shape[-1]).float() for each in (deltas, inputs))
        for part, left, right in parts.factored(name, *of_examples):
            before = seen.get(part)  # if the layer is used more than once
            seen[part] = FactoredGradients(left, right) if before is None else before.beside(left, right)

    batch = collate(examples, pad_id, next(model.parameters()).device)
    with unadapted(model), _hooked(model, keep):
        batch_loss(model, batch)[0].backward()
    return seen


@contextmanager
def _hooked(model: nn.Module, on_backward: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls on_backward(layer, deltas, inputs) in the backward pass for each use of an adapted layer in the block.

    deltas [..., out] is the gradient at the layer's output, inputs [..., in] its input. No weight takes a gradient.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = given[0].detach()
            if not output.requires_grad:  # in the first layers, whose inputs take no gradient
                output.requires_grad_(True)
            output.register_hook(lambda deltas: on_backward(name, deltas, inputs))
            return output

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in adapted_layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

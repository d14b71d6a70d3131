"""The gradient of the base weights themselves, from which LoRA-SB derives its bases."""

from collections.abc import Sequence

import torch
from torch import nn

from fedsim.core.adapters import adapted_layers, is_transposed, unadapted
from fedsim.training.batches import collate, pack
from fedsim.training.loss import row_losses
from fedsim.types import Adapter, EncodedExample


def weight_gradients(model: nn.Module, examples: Sequence[EncodedExample], *, pad_id: int, tokens_per_pass: int) -> Adapter:
    """Returns {layer: [out, in]}: the gradient of the sum of the examples' losses with respect to each adapted base weight.

    Taken at the base weights alone, without any update. float32 on the model's device; the frozen state of the model is restored. An empty
    sequence gives zeros.
    """
    layers = adapted_layers(model)
    weights = [parameter for layer in layers.values() for name, parameter in layer.base.named_parameters() if name == "weight"]
    sums = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for each in pack({0: list(examples)}, len(examples), tokens_per_pass) if examples else ():
            batch = collate([row.example for row in each.rows], pad_id, next(model.parameters()).device)
            with unadapted(model):
                gradients = torch.autograd.grad(row_losses(model, batch).sum(), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {
        name: total.T.contiguous() if is_transposed(layer.base) else total
        for (name, layer), total in zip(layers.items(), sums, strict=True)
    }


def clipped_weight_gradients(model: nn.Module, examples: Sequence[EncodedExample], clip_norm: float, *, pad_id: int) -> Adapter:
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

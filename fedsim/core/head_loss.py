"""The loss of a language model from the input of its head, without the logits of all tokens at once.

A pass of 8,192 tokens over a vocabulary of 128,256 has 4.2 GB of logits in float32, and its backward pass needs several times as much. A
frozen head needs only the gradient of its input, which can be computed with the loss, for some tokens at a time (as in Hsu et al. 2024,
arXiv 2410.10989).
"""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedsim.core.products import affine

LOGIT_BYTES = 1 << 28
"""Size of the float32 logits held at one time."""

TILE = 128
"""Tokens that a GPU multiplies together; a few more would take another tile, most of it idle."""

LOGIT_COPIES = 3
"""float32 numbers held per logit at the peak: its log-softmax, and the gradients of that and of the logit."""

CHANGED_AFTERWARDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Entries of transformers' configurations that, if not None, make a model transform its logits."""


def logit_bytes(tokens: float, vocabulary: int, *, in_parts: bool) -> float:
    """Returns the peak bytes of the loss: for all logits, or with `in_parts` (as `head_loss`) for those held at one time."""
    return LOGIT_COPIES * min(4.0 * tokens * vocabulary, LOGIT_BYTES if in_parts else inf)


def tokens_at_once(vocabulary: int) -> int:
    """Returns the number of tokens whose logits are held at one time: whole tiles, or less than one tile."""
    most = max(1, LOGIT_BYTES // (4 * vocabulary))
    return most if most < TILE else most - most % TILE


def returns_raw_logits(settings: Any) -> bool:
    """Whether a model with this configuration returns the output of its head unchanged, as `head_loss` needs."""
    return all(getattr(settings, name, None) is None for name in CHANGED_AFTERWARDS)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each token, float32: [tokens, vocabulary], [tokens] -> [tokens]; 0 where the label is -100."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)


def head_loss(
    hidden: Tensor,  # [tokens, hidden]
    weight: Tensor,  # [vocabulary, hidden]
    bias: Tensor | None,
    labels: Tensor,  # [tokens]
    weights: Tensor,  # [tokens]
    targets: Tensor,  # [targets]
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the tokens' losses times `weights`, differentiable in `hidden`, and the losses [tokens].

    Applies a frozen head of `weight` and `bias` at the distinct positions `targets`; elsewhere the loss is 0.
    """
    result: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden, weight, bias, labels, weights, targets)
    return result


class _HeadLoss(torch.autograd.Function):
    """`head_loss`; computes the gradient of the input in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed: bool = ctx.needs_input_grad[0]
        losses, grad_hidden = weights.new_zeros(len(labels)), torch.zeros_like(hidden) if needed else None
        with torch.set_grad_enabled(needed):
            for part in targets.split(tokens_at_once(len(weight))):
                x = hidden[part].detach().requires_grad_(needed)
                token_losses = cross_entropy(affine(x, weight, bias), labels[part])
                losses[part] = token_losses.detach()
                if grad_hidden is not None:
                    (grad_hidden[part],) = torch.autograd.grad((token_losses * weights[part]).sum(), x)
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * gradient, None, None, None, None, None

"""The loss of a row: the mean over its own target tokens, or the cross-entropy of its label.

No row's loss depends on another row (a token mean over the batch would couple them, and void a sensitivity bound).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.core.adapters import bound
from fedsim.training.batches import AnyBatch
from fedsim.training.pairs import PairBatch, label_losses
from fedsim.types import Adapter


def row_losses(model: nn.Module, batch: AnyBatch) -> Tensor:
    """Returns the cross-entropy of each row, averaged over its target tokens: [rows], float32. A row without target has loss 0.

    Logits are computed only from the first position that carries a loss.
    """
    if isinstance(batch, PairBatch):
        return label_losses(model, batch)
    logits = model(input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False).logits
    losses = functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=-100)
    targets = (batch.labels != -100).sum(1).clamp(min=1)
    return losses.view_as(batch.labels).sum(1) / targets


def group_gradients(
    model: nn.Module, factors: Adapter, batch: AnyBatch, weights: Tensor, *, per_example: bool = False
) -> tuple[Tensor, Adapter]:
    """Returns the loss of each row and the gradients of the weighted sum of losses with respect to `factors`.

    `factors` are stacked: [groups, ...], see `fedsim.core.products`; the gradient of group g comes from its own rows alone, and is
    [groups, rows of a group, ...] where it is taken `per_example`. `weights` [rows] multiply the losses. Forward and backward run while
    the factors are bound, as activation checkpointing needs.
    """
    leaves = {name: (_one_per_row(factor, len(weights)) if per_example else factor.detach()) for name, factor in factors.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    with bound(model, leaves):
        losses = row_losses(model, batch)
        gradients = torch.autograd.grad((losses * weights).sum(), list(leaves.values()))
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def _one_per_row(factor: Tensor, rows: int) -> Tensor:
    """Returns [groups, rows of a group, ...], a view that holds the factor of each group once."""
    groups, *shape = factor.shape
    return factor.detach().unsqueeze(1).expand(groups, rows // groups, *shape)

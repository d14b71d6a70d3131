"""The loss of a row: the mean over its own target tokens, or the cross-entropy of its label.

No row's loss depends on another row (a token mean over the batch would couple them, and void a sensitivity bound).
"""

import torch
from torch import Tensor, nn

from fedsim.core.adapters import FrozenLinear, bound
from fedsim.core.head_loss import cross_entropy, head_loss
from fedsim.training.batches import AnyBatch, Batch
from fedsim.training.labelled import LabelledBatch, label_losses
from fedsim.types import Adapter


def batch_loss(model: nn.Module, batch: AnyBatch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the sum of the rows' losses times `weights` [rows] (None: one each), which has a gradient, and the losses [rows], float32.

    A row's loss is its cross-entropy averaged over its target tokens, 0 if it has none. With a frozen head, logits are computed
    only at the positions that predict targets.
    """
    if isinstance(batch, LabelledBatch):
        losses = label_losses(model, batch)
        return (losses if weights is None else losses * weights).sum(), losses.detach()
    targets = (batch.labels != -100).sum(1).clamp(min=1)
    of_tokens = ((torch.ones_like(targets) if weights is None else weights) / targets).repeat_interleave(batch.labels.shape[1])
    labels = batch.labels.flatten()
    hidden, head = _head_inputs(model, batch)
    if head is None:
        losses = cross_entropy(hidden.flatten(0, 1), labels)
        total = (losses * of_tokens).sum()
    else:
        total, losses = head_loss(hidden.flatten(0, 1), head.weight, head.bias, labels, of_tokens, batch.targets)
    return total, losses.detach().view_as(batch.labels).sum(1) / targets


def _head_inputs(model: nn.Module, batch: Batch) -> tuple[Tensor, FrozenLinear | None]:
    """Returns the head's inputs [rows, positions, hidden] and the head; or the logits and None if the head has an adapter or the model
    changes its outputs, which is checked once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, FrozenLinear):
        return _logits(model, batch), None
    if head.is_last is None:
        head.is_last = _is_last(model, head, batch.input_ids[:, :1])  # all rows, since factors may be bound per group
    if not head.is_last:
        return _logits(model, batch), None
    with head.bypassed():
        return _logits(model, batch), head


def _is_last(model: nn.Module, head: FrozenLinear, tokens: Tensor) -> bool:
    with torch.no_grad(), head.bypassed() as captured:
        try:
            result = model(input_ids=tokens, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the model uses the logits
            return False
    return len(captured) == 1 and result is captured[0]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False).logits
    return logits


def group_gradients(
    model: nn.Module, factors: Adapter, batch: AnyBatch, weights: Tensor, *, per_example: bool = False
) -> tuple[Tensor, Adapter]:
    """Returns the loss of each row and the gradients of the weighted sum of losses with respect to `factors`.

    `factors` are stacked: [groups, ...], see `fedsim.core.products`; the gradient of group g comes from its own rows alone. With
    `per_example` the gradients are [groups, rows of a group, ...]. `weights` [rows] multiply the losses. Forward and backward run while
    the factors are bound, as activation checkpointing needs.
    """
    leaves = {name: (_one_per_row(factor, len(weights)) if per_example else factor.detach()) for name, factor in factors.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    with bound(model, leaves):
        total, losses = batch_loss(model, batch, weights)
        gradients = torch.autograd.grad(total, list(leaves.values()))
    return losses, dict(zip(leaves, gradients, strict=True))


def _one_per_row(factor: Tensor, rows: int) -> Tensor:
    """Returns the factor expanded to [groups, rows of a group, ...], a view that stores each group's factor once."""
    groups, *shape = factor.shape
    return factor.detach().unsqueeze(1).expand(groups, rows // groups, *shape)

"""Optimizers over a stack of clients: row i of every tensor belongs to client i, and no row touches another.

State is a value. Rows are ordered by their number of local steps, longest first, so the clients that still train are a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, cos, pi

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fedsim.choices import Optimizer, Schedule
from fedsim.config import TrainingConfig


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Returns the number of steps during which the learning rate rises."""
    return ceil(warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Returns the learning rate of the step with index `step` (from 0) out of `total_steps` over all rounds."""
    warmup = warmup_steps(total_steps, training.warmup_ratio)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = {Schedule.constant: 1.0, Schedule.linear: 1.0 - progress, Schedule.cosine: 0.5 * (1.0 + cos(pi * progress))}
    return training.learning_rate * decay[training.schedule]


SCRATCH_ROWS = 16
"""Clients without kept moments that are stepped at a time: few enough that their moments stay in the caches."""


@dataclass
class OptimizerState:
    """Moments of the first clients of the stack, [clients, parameters] each, and the number of steps taken in this round.

    `num_kept` clients take more than one step; the moments of the others are never used again, so they are not kept.
    """

    num_kept: int
    step: int = 0
    moments: list[Tensor] = field(default_factory=list)


def update(values: Tensor, gradients: Tensor, state: OptimizerState, rates: Sequence[float], training: TrainingConfig) -> None:
    """Takes one step in place for the first `len(gradients)` clients of `values` [clients, parameters].

    `rates` are the clients' learning rates; consecutive clients with the same rate are stepped together. The other rows and their moments
    stay unchanged. Overwrites `gradients`: nothing the size of the stack is allocated.
    """
    rules = {Optimizer.adamw: _adamw, Optimizer.sgd: _sgd}
    count = {Optimizer.adamw: 2, Optimizer.sgd: int(training.momentum > 0)}[training.optimizer]
    state.moments = state.moments or [torch.zeros_like(values[: state.num_kept]) for _ in range(count)]
    state.step += 1
    first = 0
    for rate, same in groupby(rates):
        last = first + len(list(same))
        kept = min(max(first, state.num_kept), last)
        for start, stop in [(first, kept), *((row, min(row + SCRATCH_ROWS, last)) for row in range(kept, last, SCRATCH_ROWS))]:
            if start == stop:
                continue
            rows = slice(start, stop)
            moments = [moment[rows] if stop <= state.num_kept else torch.zeros_like(values[rows]) for moment in state.moments]
            rules[training.optimizer](values[rows], gradients[rows], moments, state.step, rate, training)
        first = last


def _adamw(values: Tensor, gradients: Tensor, moments: list[Tensor], step: int, rate: float, training: TrainingConfig) -> None:
    """Calls PyTorch's fused kernel: one pass over memory."""
    mean, square = moments
    adamw(
        [values],
        [gradients],
        [mean],
        [square],
        [],
        [torch.full((), step - 1.0, device=values.device)],  # the kernel increments it
        fused=True,
        amsgrad=False,
        beta1=training.beta1,
        beta2=training.beta2,
        lr=rate,
        weight_decay=training.weight_decay,
        eps=training.epsilon,
        maximize=False,
    )


def _sgd(values: Tensor, gradients: Tensor, moments: list[Tensor], step: int, rate: float, training: TrainingConfig) -> None:
    if training.weight_decay:
        values.mul_(1 - rate * training.weight_decay)
    if training.momentum:
        gradients = moments[0].mul_(training.momentum).add_(gradients)
    values.add_(gradients, alpha=-rate)

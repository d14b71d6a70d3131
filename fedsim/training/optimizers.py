"""Optimizers over a stack of clients: row i of every tensor belongs to client i, and no row touches another.

State is a value. Rows are ordered by their number of local steps, longest first, so the clients that still train are a prefix.
"""

from dataclasses import dataclass, field
from math import ceil, cos, pi

import torch
from torch import Tensor

from fedsim.config import Optimizer, Schedule, TrainingConfig


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Returns the number of steps in which the learning rate rises."""
    return ceil(warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Returns the learning rate of the step with index `step` (from 0) out of `total_steps` over all rounds."""
    warmup = warmup_steps(total_steps, training.warmup_ratio)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    decay = {Schedule.constant: 1.0, Schedule.linear: 1.0 - progress, Schedule.cosine: 0.5 * (1.0 + cos(pi * progress))}
    return training.learning_rate * decay[training.schedule]


@dataclass
class OptimizerState:
    """Moments of the stack, [clients, parameters] each, and the number of steps taken in this round."""

    step: int = 0
    moments: list[Tensor] = field(default_factory=list)


def update(values: Tensor, gradients: Tensor, state: OptimizerState, rates: Tensor, training: TrainingConfig) -> None:
    """Takes one step in place for the first `len(gradients)` clients of `values` [clients, parameters].

    `rates` [active, 1] are the clients' learning rates. The other rows, their moments included, stay as they are.
    `gradients` is used up: its memory serves the computation, which otherwise allocates nothing the size of the stack.
    """
    rules = {Optimizer.adamw: _adamw, Optimizer.sgd: _sgd}
    state.step += 1
    rules[training.optimizer](values[: len(gradients)], gradients, values, state, rates, training)


def _moment(state: OptimizerState, index: int, like: Tensor, active: int) -> Tensor:
    if len(state.moments) <= index:
        state.moments.append(torch.zeros_like(like))
    return state.moments[index][:active]


def _adamw(active: Tensor, gradients: Tensor, stack: Tensor, state: OptimizerState, rates: Tensor, training: TrainingConfig) -> None:
    mean = _moment(state, 0, stack, len(active)).lerp_(gradients, 1 - training.beta1)
    square = _moment(state, 1, stack, len(active)).mul_(training.beta2).addcmul_(gradients, gradients, value=1 - training.beta2)
    denominator = torch.div(square, 1 - training.beta2**state.step, out=gradients).sqrt_().add_(training.epsilon)
    direction = torch.div(mean, denominator, out=gradients)
    if training.weight_decay:
        active.mul_(1 - rates * training.weight_decay)
    active.addcmul_(direction, rates, value=-1 / (1 - training.beta1**state.step))


def _sgd(active: Tensor, gradients: Tensor, stack: Tensor, state: OptimizerState, rates: Tensor, training: TrainingConfig) -> None:
    if training.weight_decay:
        active.mul_(1 - rates * training.weight_decay)
    if training.momentum:
        gradients = _moment(state, 0, stack, len(active)).mul_(training.momentum).add_(gradients)
    active.addcmul_(gradients, rates, value=-1)

"""Trains a cohort of clients in batched passes over one shared base model.

Base weights and frozen factors are shared, so clients differ only in the trained factors: these are stacked along a client axis, rows
of all clients share a pass, and the gradient of the stack is per client. A single client is a cohort of one; there is no other
training path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import nan

import torch
from torch import Tensor, nn

from fedsim.config import TrainingConfig
from fedsim.core.participation import steps_per_round
from fedsim.core.payload import Layout
from fedsim.training.batches import Pass, collate, local_batches, pack
from fedsim.training.budget import TokenBudget
from fedsim.training.loss import group_gradients
from fedsim.training.optimizers import OptimizerState, learning_rate, update
from fedsim.training.private import CohortDPOptimizer, PrivateRule, poisson_batches, sampling_rate
from fedsim.training.stack import Place, accumulate, on_device, place
from fedsim.types import Adapter, AnyEncoded


@dataclass(frozen=True)
class ClientData:
    """One client of a cohort: its id and its encoded training examples."""

    client: int
    examples: Sequence[AnyEncoded]

    @cached_property
    def lengths(self) -> list[int]:
        """Returns the number of tokens of each example."""
        return [example.num_tokens for example in self.examples]


@dataclass(frozen=True)
class LocalResult:
    """One client's trained factors, flat [parameters] float32 on the CPU, and facts about its training."""

    client: int
    factors: Tensor
    num_examples: int
    loss: float  # mean over the local steps of the loss before the update
    num_steps: int
    num_tokens: int  # without padding


@dataclass(frozen=True)
class LocalRule:
    """Changes to plain gradient steps; all tensors are [clients, parameters], in the order of the clients."""

    proximal_mu: float = 0.0  # FedProx (arXiv 1812.06127): weight of the proximal term around the start of the round
    shift: Tensor | None = None  # SCAFFOLD (arXiv 1910.06378): added to every gradient, c - c_i
    trainable: Tensor | None = None  # bool: entries that the client trains; the others stay unchanged


@dataclass(frozen=True)
class PassFacts:
    """Progress after one pass, for a display."""

    num_tokens: int
    loss: Tensor  # mean over the rows of the pass, on the device: reading it waits for the device
    fraction: float  # of the cohort's local steps, done so far


def train_cohort(
    model: nn.Module,
    start: Tensor,  # [parameters] or [clients, parameters], in the order of `clients`
    layout: Layout,
    clients: Sequence[ClientData],
    training: TrainingConfig,
    *,
    pad_id: int,
    seed: int,
    round: int,
    rounds: int,
    rule: LocalRule | None = None,
    private: PrivateRule | None = None,
    budget: TokenBudget | None = None,
    on_pass: Callable[[PassFacts], None] = lambda facts: None,
) -> list[LocalResult]:
    """Trains every client from `start` on its own examples for one round and returns the results in the order of `clients`.

    Guarantees: equal to training the clients one by one, to float tolerance; neither clients nor rows affect each other; the model's
    own factors are unchanged. The optimizer state starts fresh; the schedule runs over the local steps of all rounds. `budget` limits the
    passes (None: that of `training`, chosen for the base model alone) and stays halved if memory ran out.
    """
    cohort = _Cohort(model, start, layout, clients, training, pad_id, seed, round, rounds, rule or LocalRule(), private, on_pass)
    budget = budget or TokenBudget.of(training, model)
    for step in range(cohort.num_steps):
        cohort.take_step(step, budget)
    results = cohort.results()
    return [results[data.client] for data in clients]


class _Cohort:
    """Clients in training. Their rows of the stack are sorted by `_sort_key`, so those still training come first."""

    def __init__(
        self,
        model: nn.Module,
        start: Tensor,
        layout: Layout,
        clients: Sequence[ClientData],
        training: TrainingConfig,
        pad_id: int,
        seed: int,
        round: int,
        rounds: int,
        rule: LocalRule,
        private: PrivateRule | None,
        on_pass: Callable[[PassFacts], None],
    ) -> None:
        self._model, self._layout, self._training, self._pad_id = model, layout, training, pad_id
        self._device, self._on_pass = next(model.parameters()).device, on_pass
        self._batches_of = _batches_of(clients, training, private, seed, round)
        order = sorted(range(len(clients)), key=lambda i: _sort_key(clients[i], self._batches_of[clients[i].client]))
        self._clients = [clients[i] for i in order]
        self._num_steps = [len(self._batches_of[data.client]) for data in self._clients]
        stack = start.to(self._device, torch.float32).expand(len(clients), layout.num_parameters)
        self._stack = stack[order].contiguous()  # indexing has copied the rows
        self._gradient_buffer = torch.empty_like(self._stack)
        self._adjust = _Adjustment(rule, self._stack, layout, order)
        self._steps = _Steps(self._stack, self._adjust, self._num_steps, training, round, rounds)
        self._losses = torch.zeros(len(clients), device=self._device)  # summed over the steps so far
        self._dp_optimizer: CohortDPOptimizer | None = None
        if private is not None:
            self._dp_optimizer = _private_optimizer(private, self._clients, order, self._stack, layout, self._steps.take, training, round)

    @property
    def num_steps(self) -> int:
        """Returns the largest number of local steps of a client."""
        return max(self._num_steps)

    def take_step(self, step: int, budget: TokenBudget) -> None:
        """Takes the step for every client that has it."""
        gradients, losses = budget.within_memory(partial(self._gradients, step))
        self._losses[: len(losses)].add_(losses)
        if self._dp_optimizer is None:
            self._steps.take(gradients)
        else:
            self._dp_optimizer.finish()

    def results(self) -> dict[int, LocalResult]:
        """Returns each client's result by its id."""
        trained, losses = self._stack.cpu(), self._losses.cpu().tolist()
        return {
            data.client: _result(data, self._batches_of[data.client], trained[slot], losses[slot], with_metrics=self._dp_optimizer is None)
            for slot, data in enumerate(self._clients)
        }

    def _gradients(self, step: int, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
        """Returns the gradients [active, parameters], clipped if private, and losses [active] of the clients that take this step."""
        active = sum(n > step for n in self._num_steps)
        rows = {slot: [data.examples[i] for i in self._batches_of[data.client][step]] for slot, data in enumerate(self._clients[:active])}
        gradients, losses = self._gradient_buffer[:active].zero_(), torch.zeros(active, device=self._device)
        if self._dp_optimizer is not None:
            self._dp_optimizer.start(gradients)
        unit = self._training.batch_size if self._dp_optimizer is None else 1  # Poisson batches vary: single rows need least padding
        for each in pack(rows, unit, tokens_per_pass):
            num_tokens, of_rows = self._pass(each, gradients, losses)
            shown = of_rows.mean() * (1.0 if self._dp_optimizer is None else nan)
            self._on_pass(PassFacts(num_tokens, shown, (step + 1) / self.num_steps))
        return gradients, losses

    def _pass(self, each: Pass, gradients: Tensor, losses: Tensor) -> tuple[int, Tensor]:
        """Adds the gradients and losses of a pass to those of its clients; returns its number of tokens and the losses of its rows.

        Keeps nothing else of it: the next pass needs the memory.
        """
        batch = collate([row.example for row in each.rows], self._pad_id, self._device)
        weights = on_device(torch.tensor([row.weight for row in each.rows]), self._device)
        owners = on_device(torch.tensor([row.slot for row in each.rows]), self._device)
        where = place(each.slots, self._device)
        parts = self._layout.unpack(self._stack[where])
        if self._dp_optimizer is None:
            of_rows, found = group_gradients(self._model, parts, batch, weights)
            accumulate(gradients, self._layout, where, found)
        else:
            of_rows, found = group_gradients(self._model, parts, batch, torch.ones_like(weights), per_example=True)
            self._dp_optimizer.add(where, self._adjust.masked(where, found))
        losses.index_add_(0, owners, of_rows * weights)
        return batch.num_tokens, of_rows


class _Steps:
    """The optimizer steps of a stack of clients; client i takes `num_steps[i]` in the round, in descending order."""

    def __init__(
        self, stack: Tensor, adjust: "_Adjustment", num_steps: Sequence[int], training: TrainingConfig, round: int, rounds: int
    ) -> None:
        self._stack, self._adjust, self._num_steps, self._training = stack, adjust, num_steps, training
        self._round, self._rounds = round, rounds
        self._state = OptimizerState(num_kept=sum(n > 1 for n in num_steps))

    def take(self, gradients: Tensor) -> None:
        """Takes the next step of the first clients along their gradients [active, parameters], which it overwrites."""
        self._adjust.gradients(self._stack, gradients)
        steps, done = self._num_steps[: len(gradients)], self._state.step
        rates = [learning_rate((self._round - 1) * n + done, self._rounds * n, self._training) for n in steps]
        update(self._stack, gradients, self._state, rates, self._training)
        self._adjust.values(self._stack)


Batches = list[list[int]]
"""The indices of a client's examples in each of its local steps."""


def _batches_of(
    clients: Sequence[ClientData], training: TrainingConfig, private: PrivateRule | None, seed: int, round: int
) -> dict[int, Batches]:
    return {
        data.client: local_batches(data.lengths, training, seed=seed, round=round, client=data.client)
        if private is None
        else private_batches(data.lengths, training, private.key.torch("poisson", round, data.client))
        for data in clients
    }


def _result(data: ClientData, batches: Batches, factors: Tensor, total_loss: float, *, with_metrics: bool) -> LocalResult:
    """Leaves loss and tokens out of a private client's result: it releases nothing without noise."""
    tokens = sum(data.lengths[i] for batch in batches for i in batch) if with_metrics else 0
    loss = total_loss / max(1, len(batches)) if with_metrics else nan
    return LocalResult(data.client, factors, len(data.examples), loss, len(batches), tokens)


def _sort_key(data: ClientData, batches: Batches) -> tuple[int, int]:
    """Returns the sort key of the stack: most steps first, so that clients still training are a prefix; clients of a single step by their
    longest row, as `pack` sorts units, so that the clients of a pass are mostly adjacent and need no copy."""
    return -len(batches), -max((data.lengths[i] for i in batches[0]), default=0) if len(batches) == 1 else 0


def private_batches(lengths: Sequence[int], training: TrainingConfig, coins: torch.Generator) -> list[list[int]]:
    """Returns Poisson samples for the local steps of a round."""
    rate = sampling_rate(len(lengths), training.batch_size * training.accumulation)
    return poisson_batches(len(lengths), rate, steps_per_round(len(lengths), training), coins)


def _private_optimizer(
    private: PrivateRule,
    cohort: Sequence[ClientData],
    order: list[int],
    stack: Tensor,
    layout: Layout,
    take_step: Callable[[Tensor], None],
    training: TrainingConfig,
    round: int,
) -> CohortDPOptimizer:
    sizes, batch_size = [len(data.examples) for data in cohort], training.batch_size * training.accumulation
    return CohortDPOptimizer(
        stack,
        layout,
        take_step,
        noise_multipliers=[private.noise_multipliers[i] for i in order],
        clip_norm=private.clip_norm,
        expected_batch_sizes=[n * sampling_rate(n, batch_size) for n in sizes],
        generators=[private.key.torch("noise", round, data.client) for data in cohort],
    )


class _Adjustment:
    """Applies a rule to a stack whose rows are in `order`."""

    def __init__(self, rule: LocalRule, stack: Tensor, layout: Layout, order: list[int]) -> None:
        def sorted_like_stack(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(stack.device)[order]

        self._mu, self._layout = rule.proximal_mu, layout
        self._shift, self._trainable = sorted_like_stack(rule.shift), sorted_like_stack(rule.trainable)
        self._start = stack.clone() if self._mu or self._trainable is not None else None

    def gradients(self, stack: Tensor, gradients: Tensor) -> None:
        """Adds the rule's terms to the gradients of the active clients, in place."""
        active = len(gradients)
        if self._mu and self._start is not None:
            gradients.add_(stack[:active] - self._start[:active], alpha=self._mu)
        if self._shift is not None:
            gradients.add_(self._shift[:active])

    def masked(self, where: Place, gradients: Adapter) -> Adapter:
        """Returns the gradients [groups, rows, ...] of rows of the clients at `where`, zero where the client does not train."""
        if self._trainable is None:
            return gradients
        masks = self._layout.unpack(self._trainable[where])
        return {name: gradient * masks[name].unsqueeze(1) for name, gradient in gradients.items()}

    def values(self, stack: Tensor) -> None:
        """Restores the entries that a client does not train."""
        if self._trainable is not None and self._start is not None:
            torch.where(self._trainable, stack, self._start, out=stack)

"""Local training of a cohort of clients in batched passes over one shared base model.

The base weights and the frozen factors are common, so the clients differ in the trained factors alone: these are stacked with a client
axis, rows of all clients share a pass, and the gradient of the stack is per client. A single client is a cohort of one; there is no other
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
from fedsim.training.batches import collate, local_batches, pack
from fedsim.training.budget import TokenBudget
from fedsim.training.loss import group_gradients
from fedsim.training.optimizers import OptimizerState, learning_rate, update
from fedsim.training.private import CohortDPOptimizer, PrivateRule, poisson_batches, sampling_rate
from fedsim.training.stack import Place, accumulate, on_device, place
from fedsim.types import Adapter, AnyEncoded


@dataclass(frozen=True)
class ClientData:
    """What a cohort needs to know of one client: its id and its encoded training examples."""

    client: int
    examples: Sequence[AnyEncoded]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [example.num_tokens for example in self.examples]


@dataclass(frozen=True)
class LocalResult:
    """One client's trained factors, flat [parameters] float32 on the CPU, and facts about its training."""

    client: int
    factors: Tensor
    num_examples: int
    loss: float  # mean over the local steps of the step's loss before its update
    num_steps: int
    num_tokens: int  # without padding


@dataclass(frozen=True)
class LocalRule:
    """What local training does besides following its gradient; all tensors are [clients, parameters], in the order of the clients."""

    proximal_mu: float = 0.0  # FedProx (arXiv 1812.06127): weight of the pull towards the start of the round
    shift: Tensor | None = None  # SCAFFOLD (arXiv 1910.06378): added to every gradient, c - c_i
    trainable: Tensor | None = None  # bool: entries that the client trains; the others stay as they are


@dataclass(frozen=True)
class PassFacts:
    """What a progress display is told after each pass."""

    num_tokens: int
    loss: Tensor  # mean over the rows of the pass, still on the device: reading it waits for the device
    fraction: float  # of the cohort's local steps that are done


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

    Guarantees: equal to training the clients one by one, to float tolerance; nothing couples two clients, nor two rows; the model's
    own factors are unchanged. The optimizer state starts anew; the schedule runs over the local steps of all rounds. `budget` limits the
    passes (None takes that of `training`, chosen for the base model alone) and is left halved where memory ran out.
    """
    device = next(model.parameters()).device
    batches_of = _batches_of(clients, training, private, seed, round)
    order = sorted(range(len(clients)), key=lambda i: _place(clients[i], batches_of[clients[i].client]))
    cohort = [clients[i] for i in order]
    steps = [len(batches_of[data.client]) for data in cohort]
    stack = start.to(device, torch.float32).expand(len(clients), layout.num_parameters)[order].contiguous()  # picking rows has copied them
    space = torch.empty_like(stack)  # of the gradients
    adjust = _Adjustment(rule or LocalRule(), stack, layout, order)
    state = OptimizerState(num_kept=sum(n > 1 for n in steps))
    total_losses = torch.zeros(len(cohort), device=device)
    budget = budget or TokenBudget.of(training, model)

    def take_step(gradients: Tensor) -> None:
        adjust.gradients(stack, gradients)
        rates = [learning_rate((round - 1) * n + step, rounds * n, training) for n in steps[: len(gradients)]]
        update(stack, gradients, state, rates, training)
        adjust.values(stack)

    noised = private and _private_optimizer(private, cohort, order, stack, layout, take_step, training, round)

    def gradients_of(step: int, tokens_per_pass: int) -> tuple[Tensor, Tensor]:
        """Returns the gradients [active, parameters], clipped where private, and the losses [active] of the clients that take this step."""
        active = sum(n > step for n in steps)
        rows = {slot: [data.examples[i] for i in batches_of[data.client][step]] for slot, data in enumerate(cohort[:active])}
        gradients, step_losses = space[:active].zero_(), torch.zeros(active, device=device)
        if noised:
            noised.start(gradients)
        unit = 1 if noised else training.batch_size  # Poisson batches are of all sizes: row by row they need the least padding
        for each in pack(rows, unit, tokens_per_pass):
            batch = collate([row.example for row in each.rows], pad_id, device)
            weights = on_device(torch.tensor([row.weight for row in each.rows]), device)
            owners = on_device(torch.tensor([row.slot for row in each.rows]), device)
            where = place(each.slots, device)
            parts = layout.unpack(stack[where])
            if noised:
                losses, found = group_gradients(model, parts, batch, torch.ones_like(weights), per_example=True)
                noised.add(where, adjust.masked(where, found))
            else:
                losses, found = group_gradients(model, parts, batch, weights)
                accumulate(gradients, layout, where, found)
            del parts, found  # the next pass needs their memory
            step_losses.index_add_(0, owners, losses * weights)
            on_pass(PassFacts(batch.num_tokens, losses.mean() * (nan if noised else 1.0), (step + 1) / max(steps)))
        return gradients, step_losses

    for step in range(max(steps)):
        gradients, step_losses = budget.within_memory(partial(gradients_of, step))
        total_losses[: len(step_losses)].add_(step_losses)
        if noised:
            noised.finish()
        else:
            take_step(gradients)

    trained, of_slot = stack.cpu(), total_losses.cpu().tolist()
    results = {
        data.client: _result(data, batches_of[data.client], trained[slot], of_slot[slot], told=noised is None)
        for slot, data in enumerate(cohort)
    }
    return [results[data.client] for data in clients]


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


def _result(data: ClientData, batches: Batches, factors: Tensor, total_loss: float, *, told: bool) -> LocalResult:
    """A client of which loss and tokens are not `told` is private: it tells nothing that has no noise."""
    tokens = sum(data.lengths[i] for batch in batches for i in batch) if told else 0
    loss = total_loss / max(1, len(batches)) if told else nan
    return LocalResult(data.client, factors, len(data.examples), loss, len(batches), tokens)


def _place(data: ClientData, batches: Batches) -> tuple[int, int]:
    """Returns what orders the stack: clients of many steps come first, so that those which still train are a prefix; those of a single
    step by their longest row, as `pack` orders rows, so that a pass meets neighbours, mostly, and copies nothing then."""
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
    """A rule in force over a stack whose rows are in `order`."""

    def __init__(self, rule: LocalRule, stack: Tensor, layout: Layout, order: list[int]) -> None:
        def sorted_like_stack(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(stack.device)[order]

        self._mu, self._layout = rule.proximal_mu, layout
        self._shift, self._trainable = sorted_like_stack(rule.shift), sorted_like_stack(rule.trainable)
        self._start = stack.clone() if self._mu or self._trainable is not None else None

    def gradients(self, stack: Tensor, gradients: Tensor) -> None:
        """Adds to the gradients of the active clients, in place."""
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
        """Puts back what a client does not train."""
        if self._trainable is not None and self._start is not None:
            torch.where(self._trainable, stack, self._start, out=stack)

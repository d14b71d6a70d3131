"""Assigns examples to optimizer steps and packs the rows of a step into forward passes.

Both are pure functions of lengths and seeds. A client's steps depend on its own examples alone, and packing changes
only the order of float additions; so a result does not depend on which clients train together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from fedsim.config import TrainingConfig
from fedsim.core.participation import steps_per_round
from fedsim.seeding import numpy_generator
from fedsim.training.labelled import LabelledBatch, collate_labelled
from fedsim.training.padding import padded_width
from fedsim.training.stack import on_device
from fedsim.types import AnyEncoded, EncodedExample, EncodedLabelled

PASS_COST = 1 / 8  # overhead of a pass, as a fraction of its largest number of positions; 1/10 to 1/4 of 1024 measured on a CPU
MEGABATCH_STEPS = 8  # examples are sorted by length within this many steps, so that batches stay random


@dataclass(frozen=True)
class Row:
    """One example in a pass: `slot` is the client's position in the cohort, `weight` the example's share of the client's step loss."""

    slot: int
    example: AnyEncoded
    weight: float


@dataclass(frozen=True)
class Pass:
    """The rows of one forward and backward pass, in contiguous groups of equal size; group g belongs to the client at `slots[g]`."""

    slots: tuple[int, ...]
    rows: tuple[Row, ...]


def local_batches(lengths: Sequence[int], training: TrainingConfig, *, seed: int, round: int, client: int) -> list[list[int]]:
    """Returns the example indices of each local step of one client in one round.

    Every epoch visits each example once, in an order drawn from (seed, round, client, epoch); one batch of an epoch may be short.
    With `group_by_length`, examples of similar length share a batch, and the batches come in random order. Raises ValueError if there
    are no examples.
    """
    if not len(lengths):
        raise ValueError("Expected examples to train on, got none.")
    num_steps = steps_per_round(len(lengths), training)
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < num_steps:
        generator = numpy_generator(seed, "batches", round, client, epoch)
        batches += _epoch(np.asarray(lengths), training, generator)
        epoch += 1
    return batches[:num_steps]


def _epoch(lengths: np.ndarray, training: TrainingConfig, generator: np.random.Generator) -> list[list[int]]:
    size = training.batch_size * training.accumulation
    order = generator.permutation(len(lengths))
    if not training.group_by_length:
        return [order[start : start + size].tolist() for start in range(0, len(order), size)]
    mega = size * MEGABATCH_STEPS
    batches = []
    for start in range(0, len(order), mega):
        part = order[start : start + mega]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + size].tolist() for i in range(0, len(part), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def pack(rows_of_slot: Mapping[int, Sequence[AnyEncoded]], batch_size: int, tokens_per_pass: int) -> Iterator[Pass]:
    """Cuts one local step of a cohort into passes of at most `tokens_per_pass` tokens, including padding to the longest row.

    The unit is one client's micro-batch of `batch_size` examples, cut further only if it alone exceeds the budget. Units of similar
    length share a pass; the cut balances padding against the overhead of a pass. The group size of a pass is the greatest common
    divisor of its units' sizes. A single row is never refused, however long it is.
    """
    units: list[list[Row]] = []
    for slot, examples in rows_of_slot.items():
        ordered = sorted(examples, key=lambda example: -example.width)
        rows = [Row(slot, example, 1.0 / len(ordered)) for example in ordered]
        start = 0
        while start < len(rows):
            size = min(batch_size, max(1, tokens_per_pass // rows[start].example.width))
            units.append(rows[start : start + size])
            start += size
    units.sort(key=lambda unit: (-len(unit), -unit[0].example.width, unit[0].slot))
    lengths, sizes = [unit[0].example.width for unit in units], [len(unit) for unit in units]
    for start, stop in _cuts(lengths, sizes, tokens_per_pass):
        yield _as_pass(units[start:stop])


def _cuts(lengths: Sequence[int], sizes: Sequence[int], tokens_per_pass: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of each pass over the units, which have `sizes` rows, the longest of `lengths` tokens.

    Minimises the number of positions, including padding and PASS_COST, over all cuts that keep the order of the units. Dynamic programming:
    `least[i]` is the cost of the first i units, `cut[i]` the start of the pass that ends at i.
    """
    longest, rows, cost_of_pass = np.array(lengths), np.array(sizes), PASS_COST * tokens_per_pass
    least, cut = np.full(len(rows) + 1, np.inf), np.zeros(len(rows) + 1, dtype=np.int64)
    least[0] = 0.0
    for start in range(len(rows)):
        most = max(1, tokens_per_pass // lengths[start])
        widths, counts = np.maximum.accumulate(longest[start : start + most]), np.cumsum(rows[start : start + most])
        fitting = max(1, int(np.searchsorted(widths * counts, tokens_per_pass, side="right")))
        costs = least[start] + cost_of_pass + counts[:fitting] * padded_width(counts[:fitting], widths[:fitting])
        places = slice(start + 1, start + 1 + fitting)
        better = costs < least[places]
        least[places][better], cut[places][better] = costs[better], start
    cuts, stop = [], len(rows)
    while stop:
        cuts.append((int(cut[stop]), stop))
        stop = cuts[-1][0]
    return cuts[::-1]


def _as_pass(units: list[list[Row]]) -> Pass:
    rows = tuple(row for unit in units for row in unit)
    size = gcd(*map(len, units))
    return Pass(tuple(row.slot for row in rows[::size]), rows)


@dataclass(frozen=True)
class Batch:
    """Padded tensors of a pass. Padding is on the right, where a causal model's tokens cannot see it."""

    input_ids: Tensor  # [rows, tokens]
    labels: Tensor  # [rows, positions]; -100 where there is no loss; labels[:, t] is the token after position first + t
    targets: Tensor  # [targets]; indices of the flat labels that carry a loss, ascending
    first: int  # first position whose next token carries a loss in any row
    num_tokens: int  # tokens without padding

    @property
    def positions(self) -> Tensor:
        """Returns the positions whose logits predict `labels`: [positions]."""
        return torch.arange(self.first, self.first + self.labels.shape[1], device=self.input_ids.device)


AnyBatch = Batch | LabelledBatch
"""The batches that `fedsim.training.loss.batch_loss` takes."""


def collate(examples: Sequence[AnyEncoded], pad_id: int, device: torch.device) -> AnyBatch:
    """Pads examples of one kind, see `fedsim.training.padding`."""
    labelled = [example for example in examples if isinstance(example, EncodedLabelled)]
    if labelled:
        return collate_labelled(labelled, pad_id, device)
    return _collate_responses([example for example in examples if isinstance(example, EncodedExample)], pad_id, device)


def _collate_responses(examples: Sequence[EncodedExample], pad_id: int, device: torch.device) -> Batch:
    """Pads examples and shifts the labels; the labels end at the longest example, so padding beyond it needs no logits."""
    longest = max(example.num_tokens for example in examples)
    width = padded_width(len(examples), longest)
    first = max(0, min(example.loss_start for example in examples) - 1)
    ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    labels = np.full((len(examples), longest - 1 - first), -100, dtype=np.int64)
    for row, example in enumerate(examples):
        n, start = example.num_tokens, max(1, example.loss_start)
        ids[row, :n] = example.input_ids
        labels[row, start - 1 - first : n - 1 - first] = example.input_ids[start:]
    return Batch(
        on_device(torch.from_numpy(ids), device),
        on_device(torch.from_numpy(labels), device),
        on_device(torch.from_numpy(np.flatnonzero(labels.ravel() != -100)), device),
        first,
        sum(example.num_tokens for example in examples),
    )

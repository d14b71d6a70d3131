from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config import TrainingConfig
from fedsim.core.participation import steps_per_round
from fedsim.training import batches
from fedsim.training.batches import collate, local_batches, pack
from fedsim.training.padding import padded_width
from fedsim.types import EncodedExample, EncodedLabelled


def example(length: int, start: int = 2) -> EncodedExample:
    return EncodedExample(tuple(range(3, 3 + length)), start)


@given(n=st.integers(1, 40), batch=st.integers(1, 5), accumulation=st.integers(1, 3), epochs=st.integers(1, 3), grouped=st.booleans())
@settings(max_examples=60)
def test_every_epoch_visits_each_example_once(n, batch, accumulation, epochs, grouped):
    training = TrainingConfig(batch_size=batch, accumulation=accumulation, local_epochs=epochs, group_by_length=grouped)
    batches = local_batches([i % 7 + 2 for i in range(n)], training, seed=0, round=1, client=0)
    assert Counter(i for b in batches for i in b) == dict.fromkeys(range(n), epochs)
    assert len(batches) == steps_per_round(n, training)
    assert max(map(len, batches)) <= batch * accumulation


def test_local_steps_cycle_through_the_examples_as_often_as_needed():
    training = TrainingConfig(batch_size=2, local_steps=7)
    assert len(local_batches([4] * 5, training, seed=0, round=1, client=0)) == 7


def test_local_epochs_override_local_steps():
    assert steps_per_round(9, TrainingConfig(batch_size=2, accumulation=2, local_steps=7, local_epochs=2)) == 6


def test_order_depends_on_seed_round_and_client_only():
    training, lengths = TrainingConfig(batch_size=2), [5] * 12
    plan = local_batches(lengths, training, seed=0, round=1, client=3)
    assert plan == local_batches(lengths, training, seed=0, round=1, client=3)
    others = [{"seed": 1, "round": 1, "client": 3}, {"seed": 0, "round": 2, "client": 3}, {"seed": 0, "round": 1, "client": 4}]
    assert all(plan != local_batches(lengths, training, **other) for other in others)


def test_grouping_by_length_saves_padding():
    lengths = [3 + (37 * i) % 50 for i in range(64)]

    def padded(grouped: bool) -> int:
        training = TrainingConfig(batch_size=8, group_by_length=grouped)
        return sum(max(lengths[i] for i in b) * len(b) for b in local_batches(lengths, training, seed=0, round=1, client=0))

    assert padded(True) < 0.8 * padded(False)


@given(
    lengths=st.lists(st.lists(st.integers(3, 30), min_size=1, max_size=9), min_size=1, max_size=6),
    batch=st.integers(1, 4),
    budget=st.integers(20, 200),
)
@settings(max_examples=80)
def test_passes_hold_every_row_once_within_the_budget_and_in_equal_groups(lengths, batch, budget):
    rows = {slot: [example(n) for n in of_client] for slot, of_client in enumerate(lengths)}
    passes = list(pack(rows, batch, budget))
    seen = Counter((row.slot, row.example.num_tokens) for each in passes for row in each.rows)
    assert seen == Counter((slot, n) for slot, of_client in enumerate(lengths) for n in of_client)
    for each in passes:
        assert len(each.rows) % len(each.slots) == 0
        size = len(each.rows) // len(each.slots)
        assert [row.slot for row in each.rows] == [slot for slot in each.slots for _ in range(size)]
        longest = max(row.example.num_tokens for row in each.rows)
        assert len(each.rows) == 1 or longest * len(each.rows) <= budget


def positions(lengths, sizes, cuts, budget):
    """The cost of the passes: rows times their width, plus an eighth of the budget for each pass."""
    return sum(sum(sizes[a:b]) * padded_width(sum(sizes[a:b]), max(lengths[a:b])) + budget / 8 for a, b in cuts)


def all_cuts(stop):
    """Every way to cut units 0 to `stop` into passes of neighbours."""
    if stop == 0:
        yield []
    for start in range(stop):
        yield from ([*before, (start, stop)] for before in all_cuts(start))


@given(units=st.lists(st.tuples(st.integers(1, 3), st.integers(3, 60)), min_size=1, max_size=7), budget=st.integers(30, 400))
@settings(max_examples=80)
def test_the_chosen_cut_within_the_budget_has_the_fewest_positions(units, budget):
    sizes, lengths = zip(*sorted(units, reverse=True), strict=True)

    def fits(start, stop):
        return stop - start == 1 or max(lengths[start:stop]) * sum(sizes[start:stop]) <= budget

    possible = [cuts for cuts in all_cuts(len(units)) if all(fits(*each) for each in cuts)]
    cuts = batches._cuts(lengths, sizes, budget)
    assert cuts in possible
    assert positions(lengths, sizes, cuts, budget) == min(positions(lengths, sizes, each, budget) for each in possible)


@given(texts=st.lists(st.tuples(st.integers(1, 110), st.integers(1, 30)), min_size=1, max_size=20), budget=st.integers(300, 1200))
@settings(max_examples=60)
def test_texts_read_apart_count_as_two_rows_in_the_budget(texts, budget):
    pairs = [EncodedLabelled(tuple(range(first + second)), (), 0, first) for first, second in texts]
    for each in pack({0: pairs}, 1, budget):
        longest = max(max(row.example.split, row.example.num_tokens - row.example.split) for row in each.rows)
        assert 2 * len(each.rows) * longest <= budget


def test_training_without_examples_is_refused():
    for training in (TrainingConfig(), TrainingConfig(local_epochs=1)):
        with pytest.raises(ValueError, match="Expected examples to train on, got none"):
            local_batches([], training, seed=0, round=1, client=0)


def test_short_rows_do_not_share_a_pass_with_long_ones():
    rows = {0: [example(100)] * 6 + [example(20)] * 20}
    assert [[row.example.num_tokens for row in each.rows] for each in pack(rows, 1, 1024)] == [[100] * 6, [20] * 20]


def test_rows_of_nearly_one_length_share_a_pass():
    rows = {0: [example(50 - n % 3) for n in range(20)]}
    assert len(list(pack(rows, 1, 1024))) == 1


def test_the_weights_of_a_clients_rows_sum_to_one():
    passes = pack({0: [example(5)] * 3, 1: [example(9)] * 5}, 2, 30)
    totals = Counter()
    for each in passes:
        for row in each.rows:
            totals[row.slot] += row.weight
    assert all(abs(total - 1) < 1e-9 for total in totals.values())


def test_labels_are_the_next_tokens_from_the_loss_start_on():
    batch = collate([example(6, start=3), example(4, start=2)], pad_id=0, device=torch.device("cpu"))
    assert batch.first == 1
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 0, 0], [3, 4, 5, 6, 0, 0, 0, 0]], "padded to a width that has kernels"
    assert batch.labels.tolist() == [[-100, 6, 7, 8], [5, 6, -100, -100]]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5]
    assert batch.num_tokens == 10
    assert batch.labels.is_contiguous(), "a copy to a GPU would wait otherwise"

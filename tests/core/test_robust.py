"""The oracle is Flower: its own strategies on real messages of equal weight."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.supercore.task_identity import TaskIdentity

from fedsim.choices import ServerRule
from fedsim.config import ServerConfig
from fedsim.core import robust
from fedsim.core.robust import krum, krum_selection, median, trimmed_mean
from fedsim.flower.aggregation import RULES


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Flower makes messages only in a process that knows its task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def updates(clients, parameters=301, seed=0):
    return torch.randn(clients, parameters, generator=torch.Generator().manual_seed(seed))


def attacked(clients=9, attackers=2):
    """Honest updates around a common one; the attackers in rows 0 and 3 send the same large values."""
    stack = updates(1) + 0.1 * updates(clients, seed=1)
    stack[[0, 3][:attackers]] = 50.0
    return stack


def by_flower(strategy, stack):
    messages = [
        Message(RecordDict({"arrays": ArrayRecord({"x": Array(row.numpy())}), "m": MetricRecord({"num-examples": 1.0})}), 1, "train")
        for row in stack
    ]
    arrays, _ = strategy.aggregate_train(1, messages)
    return torch.from_numpy(np.array(arrays["x"].numpy()))


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 9, 10])
def test_median_equals_flowers_bit_for_bit(clients):
    assert torch.equal(median(updates(clients)), by_flower(FedMedian(), updates(clients)))


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 10, 11])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.2, 0.3, 0.49])
def test_trimmed_mean_equals_flowers(clients, beta):
    oracle = by_flower(FedTrimmedAvg(beta=beta), updates(clients))
    torch.testing.assert_close(trimmed_mean(updates(clients), beta), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_malicious", [0, 1, 3])
def test_krum_equals_flowers_bit_for_bit(seed, num_malicious):
    stack = updates(9, seed=seed)
    assert torch.equal(krum(stack, num_malicious), by_flower(Krum(num_malicious_nodes=num_malicious), stack))


@pytest.mark.parametrize("num_to_keep", [1, 2, 5, 7])
def test_multi_krum_equals_flowers(num_to_keep):
    for stack in (updates(9), attacked()):
        oracle = by_flower(MultiKrum(num_malicious_nodes=2, num_nodes_to_select=num_to_keep), stack)
        torch.testing.assert_close(krum(stack, 2, num_to_keep), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregate", [median, lambda stack: trimmed_mean(stack, 0.25), lambda stack: krum(stack, 2, 4)])
def test_two_attackers_of_nine_leave_the_result_within_the_range_of_the_honest_updates(aggregate):
    honest = attacked()[[1, 2, 4, 5, 6, 7, 8]]
    result = aggregate(attacked())
    assert ((honest.amin(dim=0) <= result) & (result <= honest.amax(dim=0))).all()
    assert (attacked().mean(dim=0) - honest.mean(dim=0)).abs().min() > 1  # the mean does not resist them


def test_krum_keeps_no_attacker_and_lists_the_best_client_first():
    assert not {0, 3} & set(krum_selection(attacked(), 2, 7))
    assert krum_selection(attacked(), 2, 7)[:1] == krum_selection(attacked(), 2)


def test_a_huge_attacker_does_not_change_krums_selection():
    stack = attacked()
    tame = krum_selection(stack, 2, 7)
    stack[0] = 3e38
    assert krum_selection(stack, 2, 7) == tame


def test_krum_distinguishes_updates_that_are_close_together_and_far_from_zero():
    near = updates(9).double() * 1e-3
    stack = (1e4 + near).float()
    exact = torch.cdist(stack.double(), stack.double(), compute_mode="donot_use_mm_for_euclid_dist").square().sort(dim=1).values
    assert krum_selection(stack, 2) == [int(exact[:, 1:6].sum(dim=1).argmin())]


@pytest.mark.parametrize("aggregate", [median, lambda stack: trimmed_mean(stack, 0.2), lambda stack: krum(stack, 2, 3)])
def test_the_order_of_clients_does_not_matter(aggregate):
    torch.testing.assert_close(aggregate(updates(9)), aggregate(updates(9).flip(0)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("aggregate", [median, lambda stack: trimmed_mean(stack, 0.2), lambda stack: krum(stack, 2, 3)])
def test_aggregating_in_chunks_gives_the_same_result(aggregate, monkeypatch):
    whole = aggregate(updates(9))
    monkeypatch.setattr(robust, "CHUNK", 100)  # eleven parameters at a time, four in the last chunk
    assert torch.equal(aggregate(updates(9)), whole)


def test_identical_updates_are_returned_unchanged():
    stack = updates(1).expand(9, -1)
    for result in (median(stack), trimmed_mean(stack, 0.3), krum(stack, 3, 2)):
        assert torch.equal(result, stack[0])


def test_the_median_of_huge_values_does_not_overflow():
    assert median(torch.full((2, 1), 3e38)).tolist() == torch.tensor([3e38]).tolist()


@pytest.mark.parametrize("beta", [-0.1, 0.5, 0.9, float("nan")])
def test_a_trimmed_fraction_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        trimmed_mean(updates(9), beta)


@pytest.mark.parametrize(("num_malicious", "num_to_keep"), [(4, 1), (-1, 1), (3, 0), (3, 7)])
def test_impossible_numbers_of_clients_are_refused_by_krum(num_malicious, num_to_keep):
    with pytest.raises(ValueError, match="Expected num_"):
        krum(updates(9), num_malicious, num_to_keep)


@pytest.mark.parametrize("aggregate", [median, lambda stack: trimmed_mean(stack, 0.2), lambda stack: krum(stack, 0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_updates_that_are_not_finite_are_refused(aggregate, value):
    stack = updates(5)
    stack[4, 300] = value
    with pytest.raises(ValueError, match="finite"):
        aggregate(stack)


@pytest.mark.parametrize("stack", [torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(5), torch.zeros(5, 2, dtype=torch.float64)])
@pytest.mark.parametrize("aggregate", [median, lambda stack: trimmed_mean(stack, 0.2), lambda stack: krum(stack, 1)])
def test_only_a_float32_stack_with_clients_is_aggregated(aggregate, stack):
    with pytest.raises(ValueError, match="Expected"):
        aggregate(stack)


@pytest.mark.parametrize("clients", [3, 5, 9, 49])
def test_the_trimmed_mean_rule_always_trims_at_least_one_client(clients):
    """A tenth of nine clients rounds down to none, and the mean would follow the client with the largest values."""
    stack = updates(clients)
    stack[0] = 1e4
    found = RULES[ServerRule.trimmed_mean](ServerConfig(trimmed=0.1))(stack, torch.ones(clients))
    honest = stack[1:]
    assert ((found >= honest.min(dim=0).values) & (found <= honest.max(dim=0).values)).all()


def test_a_trimmed_fraction_that_is_a_whole_number_of_clients_survives_float_rounding():
    stack = torch.arange(100.0).unsqueeze(1)
    stack[71:] = 1e6  # 29 attackers
    assert float(trimmed_mean(stack, 0.29)) == float(stack[29:71].mean())

"""Partitions: every example once, the configured skew, and the same result for the same seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.choices import DirichletOver, Partition
from fedsim.config import FederationConfig
from fedsim.core.partition import apportion, holdings, partition
from fedsim.errors import UserError
from fedsim.types import Example, Family


def examples(*counts, labels=3):
    """Returns `counts[t]` examples of each task t; gold answers cycle through the labels."""
    return [Example(f"task{t}", Family.arithmetic, "q", "r", str(i % labels)) for t, n in enumerate(counts) for i in range(n)]


SKEWED = [kind for kind in Partition if kind is not Partition.natural]
"""Partitions that are drawn; the natural one follows from the data."""


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from(SKEWED),
    st.sampled_from(DirichletOver),
    st.floats(0.01, 100),
    st.floats(0, 3),
)
def test_every_example_belongs_to_one_client_and_every_client_has_one(counts, clients, kind, over, alpha, sigma):
    pool = examples(*counts)
    clients = min(len(pool), max(clients, len(counts)))
    federation = FederationConfig(clients=clients, partition=kind, dirichlet_over=over, alpha=alpha, quantity_sigma=sigma)
    shards = partition(pool, federation, 0)
    assert sorted(i for shard in shards for i in shard) == list(range(len(pool)))
    assert len(shards) == clients
    assert all(shard and shard == sorted(shard) for shard in shards)
    assert shards == partition(pool, federation, 0)


def test_another_seed_gives_another_partition():
    federation = FederationConfig(clients=5)
    assert partition(examples(50), federation, 0) != partition(examples(50), federation, 1)


@pytest.mark.parametrize("kind", SKEWED)
def test_a_client_gets_random_examples_of_its_tasks(kind):
    shards = partition(examples(200), FederationConfig(clients=4, partition=kind), 0)
    assert all(max(shard) - min(shard) > 2 * len(shard) for shard in shards)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 3000))
def test_apportioned_numbers_are_whole_complete_and_in_proportion(weights, more):
    weights = np.array(weights)
    total = len(weights) + more
    shares = apportion(weights, total)
    assert shares.sum() == total
    assert shares.min() >= 1
    quotas = weights / weights.sum() * total
    assert quotas.min() < 1 or (abs(shares - quotas) < 1 + 1e-6).all()


@pytest.mark.parametrize(
    ("weights", "total", "shares"),
    [
        ([1, 1, 2], 5, [1, 1, 3]),
        ([1, 1, 2], 6, [2, 1, 3]),  # ties go to the lower index
        ([1, 1, 1], 5, [2, 2, 1]),
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 2, 100], 9, [1, 1, 7]),
        ([1, 10, 20], 10, [1, 3, 6]),
        ([1e-250, 1], 10, [1, 9]),
    ],
)
def test_the_rest_goes_to_the_largest_remainders_and_every_share_is_at_least_one(weights, total, shares):
    assert apportion(np.array(weights), total).tolist() == shares


@pytest.mark.parametrize("n", [3, 7, 10, 49, 1000])
def test_equal_weights_of_any_size_give_equal_numbers(n):
    for weight in (0.1, 1 / 3, 1e-200):
        assert set(apportion(np.full(n, weight), n)) == {1}
        assert set(apportion(np.full(n, weight), 7 * n)) == {7}


def test_an_extreme_quantity_skew_leaves_one_example_to_every_client_but_one():
    sizes = sorted(len(shard) for shard in partition(examples(100), FederationConfig(clients=5, quantity_sigma=1e6), 0))
    assert sizes == [1, 1, 1, 1, 96]


def test_iid_shards_have_equal_size_and_the_overall_mixture():
    shards = partition(examples(600, 300), FederationConfig(clients=9), 0)
    assert {len(shard) for shard in shards} == {100}
    assert all(50 <= sum(i < 600 for i in shard) <= 83 for shard in shards)


def test_a_partition_by_task_gives_each_client_one_task_and_each_task_clients_by_its_size():
    pool = examples(600, 300)
    shards = partition(pool, FederationConfig(clients=9, partition=Partition.task), 0)
    tasks = [{pool[i].task for i in shard} for shard in shards]
    assert all(len(held) == 1 for held in tasks)
    assert Counter(task for held in tasks for task in held) == {"task0": 6, "task1": 3}


def unevenness(alpha, over):
    """Mean largest share of one group in a client's shard."""
    pool = examples(400, 400, labels=2)
    federation = FederationConfig(clients=20, partition=Partition.dirichlet, alpha=alpha, dirichlet_over=over)
    key = (lambda e: e.task) if over is DirichletOver.task else (lambda e: (e.task, e.answer))
    return np.mean([max(Counter(key(pool[i]) for i in shard).values()) / len(shard) for shard in partition(pool, federation, 0)])


@pytest.mark.parametrize(("over", "groups"), [(DirichletOver.task, 2), (DirichletOver.label, 4)])
def test_a_small_alpha_separates_and_a_large_one_mixes(over, groups):
    skewed, middling, mixed = (unevenness(alpha, over) for alpha in (0.01, 1.0, 1000.0))
    assert skewed > 0.85
    assert mixed < 1 / groups + 0.1
    assert mixed < middling < skewed


@pytest.mark.parametrize("kind", SKEWED)
def test_quantity_skew_is_log_normal(kind):
    federation = FederationConfig(clients=400, partition=kind, quantity_sigma=0.5)
    sizes = [len(shard) for shard in partition(examples(40_000, 40_000), federation, 0)]
    assert 0.42 < np.std(np.log(sizes)) < 0.58
    even = [len(shard) for shard in partition(examples(40_000, 40_000), FederationConfig(clients=400, partition=kind), 0)]
    assert set(even) == {200}


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 3))
def test_a_natural_partition_gives_every_owner_to_one_client(owners, clients, seed):
    pool = [Example("task", Family.text, "q", "r", "r", owner) for owner in owners]
    clients = min(clients, len(set(owners)))
    shards = partition(pool, FederationConfig(clients=clients, partition=Partition.natural), seed)
    assert sorted(i for shard in shards for i in shard) == list(range(len(pool)))
    held = [{owners[i] for i in shard} for shard in shards]
    assert sum(map(len, held)) == len(set(owners)), "no owner's data is torn apart"
    assert max(map(len, held)) - min(map(len, held)) <= 1
    if clients == len(set(owners)):
        assert held == [{owner} for owner in dict.fromkeys(owners)], "the clients are the owners, as the data first names them"


def test_a_natural_partition_without_enough_owners_is_refused():
    natural = FederationConfig(clients=3, partition=Partition.natural)
    with pytest.raises(UserError, match=r"expected data that names its owners; name their column in data.client_column"):
        partition(examples(5), natural, 0)
    with pytest.raises(UserError, match=r"at most the 2 owners .* got federation.clients=3; use federation.clients=2 or fewer"):
        partition([Example("task", Family.text, "q", "r", "r", owner) for owner in "abab"], natural, 0)


def test_a_dirichlet_partition_over_labels_of_free_text_is_refused():
    pool = [Example("task", Family.text, "q", str(i), str(i)) for i in range(20)]
    over_labels = FederationConfig(clients=2, partition=Partition.dirichlet, dirichlet_over=DirichletOver.label)
    with pytest.raises(UserError, match=r"federation.dirichlet_over=label: free text has no labels to mix"):
        partition(pool, over_labels, 0)


def test_holdings_count_by_task():
    pool = examples(4, 2)
    assert holdings(pool, [[0, 1, 4], [2, 3, 5]]) == [{"task0": 2, "task1": 1}] * 2
    assert holdings(pool, [[0], [1, 2, 3, 4, 5]])[0] == {"task0": 1, "task1": 0}


def test_more_clients_than_examples_or_fewer_than_tasks_are_refused():
    with pytest.raises(UserError, match="at most the 4 training examples, got 5"):
        partition(examples(4), FederationConfig(clients=5), 0)
    with pytest.raises(UserError, match="at least one client for each of the 2 tasks"):
        partition(examples(4, 4), FederationConfig(clients=1, partition=Partition.task), 0)

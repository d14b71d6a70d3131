"""Deals training examples to clients: one index list per client, disjoint and complete.

Skew in what a client holds (task, or a Dirichlet mixture drawn per client as in Hsu et al. 2019, arXiv 1909.06335) and skew in how
much it holds (log-normal) are independent choices that compose. A natural partition has the skew of the data's owners.
"""

from collections.abc import Sequence

import numpy as np

from fedsim.choices import DirichletOver, Partition
from fedsim.config import FederationConfig
from fedsim.errors import UserError
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample, Example, Family, Labelled

MOST_COLUMNS = 12
"""Most labels by which holdings are counted; a wider table is hard to read."""


def partition(examples: Sequence[AnyExample], federation: FederationConfig, seed: int) -> list[list[int]]:
    """Returns the ascending example indices of each client.

    Guarantees: every example belongs to exactly one client; every client has at least one; the same arguments give the same shards.
    Raises UserError for more clients than examples, fewer clients than tasks with partition=task, more clients than owners or
    examples without an owner with partition=natural, and a mixture over free text.
    """
    if federation.clients > len(examples):
        raise UserError(
            f"federation.clients: expected at most the {len(examples)} training examples, got {federation.clients}; "
            "use fewer clients or more examples."
        )
    generator = numpy_generator(seed, "partition")
    logs = federation.quantity_sigma * generator.standard_normal(federation.clients)
    weights = np.exp(np.maximum(logs - logs.max(), -600))  # relative to the largest: exp neither overflows nor vanishes
    shards = DEALT[federation.partition](examples, federation, weights, generator)
    return [sorted(int(i) for i in shard) for shard in shards]


def holdings(examples: Sequence[AnyExample], shards: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Returns each client's number of examples by task, with every task in alphabetical order.

    A single classification task with at most `MOST_COLUMNS` labels is counted by label instead, in the order of the labels.
    """
    kinds = sorted({example.task for example in examples})
    labels = examples[0].labels if len(kinds) == 1 and isinstance(examples[0], Labelled) else ()
    by_label = 0 < len(labels) <= MOST_COLUMNS
    found = [dict.fromkeys(labels if by_label else kinds, 0) for _ in shards]
    for counts, shard in zip(found, shards, strict=True):
        for i in shard:
            counts[examples[i].answer if by_label else examples[i].task] += 1
    return found


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Returns whole numbers in proportion to `weights` [n], each at least 1, that sum to `total`, which is at least n.

    Weights are positive. Raising numbers to 1 keeps the proportions of the others. Rounded by largest remainder; ties go to the lower
    index.
    """
    free = np.ones(len(weights), dtype=bool)  # not raised to 1
    while True:
        ideal = np.where(free, weights / weights[free].sum() * (total - np.sum(~free)), 1.0)
        small = ideal < 1 - 1e-9
        if not small.any():
            break
        free &= ~small
    shares = np.maximum(ideal.astype(np.int64), 1)
    shares[np.argsort(shares - ideal, kind="stable")[: total - int(shares.sum())]] += 1
    return shares


def _iid(
    examples: Sequence[AnyExample], federation: FederationConfig, weights: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    return _cut(generator.permutation(len(examples)), apportion(weights, len(examples)))


def _by_task(
    examples: Sequence[AnyExample], federation: FederationConfig, weights: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Gives each task clients in proportion to its examples, at least one."""
    groups = _groups(examples, DirichletOver.task)
    if federation.clients < len(groups):
        raise UserError(
            f"federation.partition=task: expected at least one client for each of the {len(groups)} tasks, "
            f"got federation.clients={federation.clients}; use more clients."
        )
    sizes = np.array([len(group) for group in groups])
    shards: list[np.ndarray] = []
    for group, count in zip(groups, apportion(sizes, federation.clients), strict=True):
        own = weights[len(shards) : len(shards) + count]
        shards += _cut(generator.permutation(group), apportion(own, len(group)))
    return shards


def _dirichlet(
    examples: Sequence[AnyExample], federation: FederationConfig, weights: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Draws each client's mixture around the overall one, then its examples without replacement.

    The concentration is alpha per group if groups are equally large. An exhausted group is left out of the mixtures of later clients.
    Raises UserError for a mixture over free-text answers, which all differ.
    """
    if federation.dirichlet_over is DirichletOver.label and any(
        isinstance(each, Example) and each.family is Family.text for each in examples
    ):
        raise UserError(
            "federation.dirichlet_over=label: free text has no labels to mix; use federation.dirichlet_over=task and data.task_column=."
        )
    groups = [generator.permutation(group) for group in _groups(examples, federation.dirichlet_over)]
    sizes = np.array([len(group) for group in groups])
    used = np.zeros(len(groups), dtype=np.int64)
    concentration = federation.alpha * len(groups) * sizes / sizes.sum()
    quotas = apportion(weights, len(examples))
    shards: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * federation.clients
    for client in generator.permutation(federation.clients):  # in random order: the last ones get what is left
        mixture = generator.dirichlet(concentration)
        counts = _draw(mixture, int(quotas[client]), sizes - used, generator)
        shards[client] = np.concatenate([group[u : u + n] for group, u, n in zip(groups, used, counts, strict=True)])
        used += counts
    return shards


def _natural(
    examples: Sequence[AnyExample], federation: FederationConfig, weights: np.ndarray, generator: np.random.Generator
) -> list[np.ndarray]:
    """Deals whole owners to the clients in turn, in the order in which the data first names them."""
    owners: dict[str | None, list[int]] = {}
    for i, example in enumerate(examples):
        owners.setdefault(example.client, []).append(i)
    if None in owners:
        raise UserError("federation.partition=natural: expected data that names its owners; name their column in data.client_column.")
    if federation.clients > len(owners):
        raise UserError(
            f"federation.partition=natural: expected at most the {len(owners)} owners whom data.client_column names, "
            f"got federation.clients={federation.clients}; use federation.clients={len(owners)} or fewer."
        )
    held: list[list[int]] = [[] for _ in range(federation.clients)]
    for number, own in enumerate(owners.values()):
        held[number % federation.clients] += own
    return [np.array(own) for own in held]


DEALT = {Partition.iid: _iid, Partition.task: _by_task, Partition.dirichlet: _dirichlet, Partition.natural: _natural}


def _draw(mixture: np.ndarray, quota: int, available: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns how many examples of each group are taken: `quota` in all, at most `available` of each."""
    taken = np.zeros(len(mixture), dtype=np.int64)
    while (left := quota - int(taken.sum())) > 0:
        chances = np.where(available > taken, mixture, 0.0)
        if chances.sum() <= 0:  # the mixture has only exhausted groups
            chances = (available - taken).astype(float)
        taken = np.minimum(taken + generator.multinomial(left, chances / chances.sum()), available)
    return taken


def _groups(examples: Sequence[AnyExample], over: DirichletOver | None) -> list[np.ndarray]:
    """Returns example indices by task, or by task and gold answer, in alphabetical order."""
    keys = [(example.task, example.answer if over is DirichletOver.label else "") for example in examples]
    found: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [np.array(found[key]) for key in sorted(found)]


def _cut(order: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(order, np.cumsum(sizes)[:-1])

"""Assigns the training examples to the clients' shards and, if the server needs one, to its public sample."""

from collections.abc import Sequence
from typing import NamedTuple

from fedsim.choices import Init
from fedsim.config import Config
from fedsim.core.partition import partition
from fedsim.errors import UserError
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample


class Assignment(NamedTuple):
    """The training examples, each assigned once."""

    pool: list[AnyExample]  # the clients' examples, in their original order
    shards: list[list[int]]  # positions in the pool of each client's examples
    public: list[AnyExample]  # the server's sample for `adapter.init=gradient_public`, in its original order


def assign_examples(config: Config, train: Sequence[AnyExample]) -> Assignment:
    """Returns the examples of the server and of each client; if `data.owner` is set, all belong to that client, whose own data they are.

    Raises UserError if nothing would be left to assign, or if `partition` cannot assign it.
    """
    if (owner := config.data.owner) is not None:
        return Assignment(list(train), [list(range(len(train))) if i == owner else [] for i in range(config.federation.clients)], [])
    pool, public = _split(config, train)
    return Assignment(pool, partition(pool, config.federation, config.seed), public)


def _split(config: Config, train: Sequence[AnyExample]) -> tuple[list[AnyExample], list[AnyExample]]:
    if config.adapter.init is not Init.gradient_public:
        return list(train), []
    count = config.adapter.init_samples
    if count >= len(train):
        raise UserError(f"adapter.init_samples: expected fewer than the {len(train)} training examples, got {count}.")
    public = set(numpy_generator(config.seed, "public").permutation(len(train))[:count].tolist())
    return [example for i, example in enumerate(train) if i not in public], [train[i] for i in sorted(public)]

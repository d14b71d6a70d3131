"""Each client's holdings, from the data and the partition alone, without loading a model or training."""

from typing import NamedTuple

from fedsim.choices import Partition
from fedsim.config import Config
from fedsim.core.partition import holdings
from fedsim.data import load
from fedsim.data.assignment import assign_examples
from fedsim.effective import effective


class Held(NamedTuple):
    """The figures of `fedsim data`, in the order of the clients."""

    holdings: list[dict[str, int]]  # training examples by task
    owners: list[list[str]]  # the clients' names in the data; empty unless the partition is natural
    skipped: list[str]  # what was left out of the data, in words


def holdings_of(config: Config) -> Held:
    """Returns the clients' holdings. Raises UserError for bad data."""
    config = effective(config)
    data = load(config.data, config.seed)
    dealt = assign_examples(config, data.train)
    owners = [list(dict.fromkeys(dealt.pool[i].client or "" for i in shard)) for shard in dealt.shards]
    natural = config.federation.partition is Partition.natural
    return Held(holdings(dealt.pool, dealt.shards), owners if natural else [], data.skipped)

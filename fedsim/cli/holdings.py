"""Who holds what, from the data and the partition alone: no model is loaded and nothing is trained."""

from typing import NamedTuple

from fedsim.choices import Partition
from fedsim.config import Config
from fedsim.core.partition import holdings
from fedsim.data import load
from fedsim.data.dealing import deal
from fedsim.effective import effective


class Held(NamedTuple):
    """What `fedsim data` shows of the clients, in their order."""

    holdings: list[dict[str, int]]  # number of training examples by task
    owners: list[list[str]]  # names in the data of those who have them, of a natural partition
    skipped: list[str]  # what was left out of the data


def holdings_of(config: Config) -> Held:
    """Returns who holds what. Raises UserError for bad data."""
    config = effective(config)
    data = load(config.data, config.seed)
    dealt = deal(config, data.train)
    owners = [list(dict.fromkeys(dealt.pool[i].client or "" for i in shard)) for shard in dealt.shards]
    natural = config.federation.partition is Partition.natural
    return Held(holdings(dealt.pool, dealt.shards), owners if natural else [], data.skipped)

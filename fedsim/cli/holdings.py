"""Who holds what, from the data and the partition alone: no model is loaded and nothing is trained."""

from fedsim.config import Config
from fedsim.core.partition import holdings, partition
from fedsim.data import load
from fedsim.data.public import split_public
from fedsim.effective import effective


def holdings_of(config: Config) -> tuple[list[dict[str, int]], list[str]]:
    """Returns the number of training examples of each client by task, and what was left out. Raises UserError for bad data."""
    config = effective(config)
    data = load(config.data, config.seed)
    pool, _ = split_public(config, data.train)
    return holdings(pool, partition(pool, config.federation, config.seed)), data.skipped

"""Who holds what, from the data and the partition alone: no model is loaded and nothing is trained."""

from fedsim.config import Config
from fedsim.core.partition import holdings, partition
from fedsim.data import load
from fedsim.session import effective


def holdings_of(config: Config) -> list[dict[str, int]]:
    """Returns the number of training examples of each client by task. Raises UserError for data that cannot be read or dealt."""
    examples = load(config.data, config.seed).train
    return holdings(examples, partition(examples, effective(config).federation, config.seed))

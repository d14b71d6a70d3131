"""Loading that holds `fedsim.data.check` to what it says, for every configuration that the tests load."""

from conftest import refusal

from fedsim import data


def load(config, seed):
    """Loads; what `check` refuses is refused by loading, in the same words."""
    early = refusal(data.check, config)
    assert early is None or early == refusal(data.load, config, seed)
    return data.load(config, seed)

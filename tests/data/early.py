"""Loading that also holds `fedsim.data.check` to its promise, for every configuration that the tests load."""

from conftest import refusal

from fedsim import data


def load(config, seed):
    """Loads, and asserts that loading refuses what `check` refuses, in the same words."""
    early = refusal(data.check, config)
    assert early is None or early == refusal(data.load, config, seed)
    return data.load(config, seed)

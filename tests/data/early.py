"""Loading that holds `fedsim.data.check` to what it says, for every configuration that the tests load."""

from fedsim import data
from fedsim.errors import UserError


def load(config, seed):
    """Loads; what `check` refuses is refused by loading, in the same words."""
    early = _refusal(data.check, config)
    assert early is None or early == _refusal(data.load, config, seed)
    return data.load(config, seed)


def _refusal(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return None

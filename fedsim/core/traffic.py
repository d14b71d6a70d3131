"""The parts that clients hold at first, and the sizes of what they are sent: shared by a run and the command that predicts its cost."""

from collections.abc import Callable, Iterator, Sequence

from fedsim.choices import Init
from fedsim.config import Config
from fedsim.core.communication import Purpose
from fedsim.core.exchange import CONTROL, WEIGHTS, Exchange
from fedsim.core.forms import HEAD
from fedsim.core.initialization import DERIVED
from fedsim.core.methods import Method

Sizes = Callable[[tuple[str, ...]], int]
"""Number of parameters of the given kinds of factors that one client holds."""

GRADIENTS_NEED = (WEIGHTS, HEAD)
"""Parts on which the gradients of the base weights depend: these weights, and a head that the loss goes through. No other factor is."""


def starting_exchange(method: Method, init: Init | None, *, scaffold: bool) -> Exchange:
    """Returns the versions that clients hold before the first round: only what they can derive from seed and base model.

    Kinds trained in round 1 are sent as the start of training even if they could be derived; with a method that restarts in every round,
    clients derive all kinds in every round except a classification head, which continues.
    """
    kinds = method.kinds
    derived = {WEIGHTS, *method.local, *method.personal}
    rederived: set[str] = set()
    if method.restart is not None:
        derived |= set(kinds) - {HEAD}
        rederived = set(kinds) - {HEAD}
    elif init in DERIVED:
        derived |= set(kinds) - set(method.trained(1))
        rederived = set(kinds) - set(method.moving) - set(method.personal)
    parts = (*kinds, WEIGHTS, *((CONTROL,) if scaffold else ()))
    return Exchange(dict.fromkeys(parts, 0), frozenset(derived), frozenset(rederived))


def refresh_due(config: Config, number: int) -> bool:
    """Whether new bases are computed after round `number`."""
    every = config.adapter.refresh_every
    return every > 0 and number % every == 0 and number < config.federation.rounds


def needed_for_gradients(exchange: Exchange) -> tuple[str, ...]:
    """Returns the parts that a client must hold to take gradients of the base weights."""
    return tuple(part for part in GRADIENTS_NEED if part in exchange.versions)


def down_sizes(
    exchange: Exchange, moving: Sequence[str], client: int, parts: Sequence[str], sizes: Sizes, whole: int, increment: int
) -> Iterator[tuple[Purpose, int]]:
    """Yields purpose and number of parameters of each record that sends `parts` to the client.

    `whole` and `increment` are the sizes of the sum of all additions to the base weights, and of the last increment.
    """
    kinds = [part for part in parts if part not in (WEIGHTS, CONTROL)]
    for purpose, chosen in (
        (Purpose.adapter, tuple(kind for kind in kinds if kind in moving)),
        (Purpose.bases, tuple(kind for kind in kinds if kind not in moving)),
    ):
        if chosen:
            yield purpose, sizes(chosen)
    if WEIGHTS in parts:
        yield Purpose.fold, increment if exchange.takes_increment(client) else whole
    if CONTROL in parts:
        yield Purpose.control, sizes((CONTROL,))

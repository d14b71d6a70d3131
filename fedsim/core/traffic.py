"""What a client is sent, in numbers: shared by the ledger of a run and by the command that predicts it."""

from collections.abc import Callable, Iterator, Sequence

from fedsim.core.communication import Purpose
from fedsim.core.exchange import CONTROL, WEIGHTS, Exchange

Sizes = Callable[[tuple[str, ...]], int]
"""Number of parameters of factors of some kinds, as one client holds them."""


def down_sizes(
    exchange: Exchange, moving: Sequence[str], client: int, parts: Sequence[str], sizes: Sizes, whole: int, increment: int
) -> Iterator[tuple[Purpose, int]]:
    """Yields purpose and number of parameters of each record that brings the client the parts that it lacks.

    `whole` and `increment` are the sizes of all that was added to the base weights, and of the last increment.
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

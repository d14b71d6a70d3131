"""How replies come in: one after the other, from any Flower Grid; where there will be none, that is told with its reason."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.core.missing import Reason
from fedsim.flower.asking import Ask
from fedsim.flower.worker import NEEDS_STATE, REFUSED


@dataclass(frozen=True)
class Failure:
    """What comes in place of a reply: none of the clients that the request named will send anything for it."""

    reason: Reason
    detail: str = ""


def gathered(grid: Grid, asks: Iterable[Ask], again: Callable[[Ask], Ask]) -> Iterator[tuple[Ask, Message | Failure]]:
    """Yields each request with its reply, as they come; a request is made only when its turn comes.

    A worker process that lacks something of the global state is sent its request again, as `again` makes it.
    """
    lacking = []
    for ask, reply in _exchanged(grid, asks):
        if isinstance(reply, Message) and NEEDS_STATE in reply.content:
            lacking.append(again(ask))
        else:
            yield ask, reply
    if lacking:
        yield from _exchanged(grid, lacking)


def read(reply: Message) -> Message | Failure:
    """Returns the reply, or what its error says."""
    if not reply.has_error():
        return reply
    reason = Reason.refused_by_client if reply.error.code == REFUSED else Reason.died
    return Failure(reason, str(reply.error.reason))


def _exchanged(grid: Grid, asks: Iterable[Ask]) -> Iterator[tuple[Ask, Message | Failure]]:
    waiting: list[Ask] = []

    def messages() -> Iterator[Message]:
        for ask in asks:
            waiting.append(ask)
            yield ask.message

    for reply in grid.send_and_receive(messages()):
        place = [ask.message.metadata.message_id for ask in waiting].index(reply.metadata.reply_to_message_id)
        yield waiting.pop(place), read(reply)
    yield from ((ask, Failure(Reason.timeout)) for ask in waiting)

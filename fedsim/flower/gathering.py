"""Collects replies from any Flower Grid, one by one, until all or enough have arrived or the time is up.

A Grid's own `send_and_receive` returns nothing before the last reply or the timeout, so one dead node holds up the round. Here messages
are pushed and replies pulled in a loop; a failure is reported with its reason as soon as it is known.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.core.missing import Reason
from fedsim.flower.asking import Ask
from fedsim.flower.grid import forget
from fedsim.flower.worker import NEEDS_STATE, REFUSED

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds between two polls for replies; a poll that finds some resets the pause
PER_NODE = 2  # messages queued per node, so that the next is ready when one is done


@dataclass(frozen=True)
class Failure:
    """Stands in for a reply: none of the request's clients will answer it."""

    reason: Reason
    detail: str = ""


def gathered(
    grid: Grid,
    asks: Iterable[Ask],
    again: Callable[[Ask], Ask],
    *,
    timeout: float | None,
    enough: Callable[[], bool],
    in_turn: bool,
) -> Iterator[tuple[Ask, Message | Failure]]:
    """Yields each request with its reply as replies arrive; requests are made lazily.

    A worker process that lacks a part of the global state is sent its request again once, as `again` makes it. After `timeout` seconds,
    or once `enough` returns True, outstanding requests are yielded as failures and unsent requests are dropped.
    Replies to anything else, such as an earlier round, are ignored. With `in_turn` replies are yielded in the order of their requests, so
    that floating-point sums, and which clients come first, do not depend on the speed of workers.
    """
    return _Gathering(grid, iter(asks), again, timeout, enough, in_turn=in_turn).replies()


def read(reply: Message) -> Message | Failure:
    """Returns the reply, or its error as a Failure."""
    if not reply.has_error():
        return reply
    reason = Reason.refused_by_client if reply.error.code == REFUSED else Reason.died
    return Failure(reason, str(reply.error.reason)[:300])


class _Gathering:
    def __init__(
        self,
        grid: Grid,
        asks: Iterator[Ask],
        again: Callable[[Ask], Ask],
        timeout: float | None,
        enough: Callable[[], bool],
        *,
        in_turn: bool,
    ) -> None:
        self._grid, self._unsent, self._again, self._enough, self._in_turn = grid, enumerate(asks), again, enough, in_turn
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._window = PER_NODE * max(1, len(list(grid.get_node_ids())))
        self._waiting: dict[str, tuple[int, Ask]] = {}  # turn and request by message id
        self._resent: set[str] = set()
        self._results: dict[int, tuple[Ask, Message | Failure]] = {}  # not yielded yet, by turn, in order of arrival
        self._turn = 0  # the first that is not yielded yet

    def replies(self) -> Iterator[tuple[Ask, Message | Failure]]:
        pause = FIRST_PAUSE
        while self._send_more() and not self._finished:
            polled = time.monotonic()
            found = list(self._grid.pull_messages(list(self._waiting)))
            for reply in found:
                self._receive(reply)
                yield from self._due()
            pause = FIRST_PAUSE if found else self._sleep(polled, pause)
        late = "no longer needed: enough others have replied" if self._enough() else "no reply within federation.round_timeout"
        forget(self._grid, self._waiting)
        for turn, ask in self._waiting.values():
            self._results[turn] = ask, Failure(Reason.timeout, late)
        yield from (self._results[turn] for turn in (sorted(self._results) if self._in_turn else [*self._results]))

    def _due(self) -> Iterator[tuple[Ask, Message | Failure]]:
        """Yields and drops the results that may be yielded now."""
        for turn in [*self._results] if not self._in_turn else count(self._turn):
            if turn not in self._results:
                return
            self._turn = turn + 1
            yield self._results.pop(turn)

    @property
    def _finished(self) -> bool:
        return self._enough() or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _send_more(self) -> bool:
        """Sends as many requests as the window allows. Returns whether any is outstanding."""
        if not self._finished:
            for turn, ask in islice(self._unsent, max(0, self._window - len(self._waiting) - len(self._results))):
                self._push(turn, ask)
        return bool(self._waiting)

    def _push(self, turn: int, ask: Ask) -> str | None:
        if self._deadline is not None:  # the SuperLink refuses a late reply as well
            ask.message.metadata.ttl = max(1.0, self._deadline - time.monotonic())
        for message_id in self._grid.push_messages([ask.message]):
            if message_id:
                self._waiting[message_id] = turn, ask
                return message_id
        self._results[turn] = ask, Failure(Reason.died, "the message could not be sent")
        return None

    def _receive(self, reply: Message) -> None:
        turn, ask = self._waiting.pop(reply.metadata.reply_to_message_id, (0, None))
        if ask is None:
            return
        if reply.has_error() or NEEDS_STATE not in reply.content:
            self._results[turn] = ask, read(reply)
        elif reply.metadata.reply_to_message_id in self._resent:
            self._results[turn] = ask, Failure(Reason.died, "it lacks something of the global state that it was sent")
        elif sent := self._push(turn, self._again(ask)):
            self._resent.add(sent)

    def _sleep(self, polled: float, pause: float) -> float:
        """Sleeps until `pause` seconds after the last poll began, which may itself have waited for replies. Returns the next pause."""
        ends = polled + pause if self._deadline is None else min(polled + pause, self._deadline)
        time.sleep(max(0.0, ends - time.monotonic()))
        return min(1.5 * pause, LONGEST_PAUSE)

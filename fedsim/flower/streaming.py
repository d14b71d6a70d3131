"""Any Flower Grid with the manners of the one in process: messages are made when their turn comes, replies are handed on as they come.

Flower's own Grid for deployments makes all messages before it sends one, takes no iterator, and looks for replies every three seconds.
"""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.05, 1.0, 1.3
"""Seconds between two looks for replies, growing while none comes."""


class StreamingGrid(Grid):
    """Sends over another Grid, one message at a time."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends each message before the next is made. Returns the ids of those that could be sent."""
        sent = []
        for message in messages:
            sent += [message_id for message_id in self._grid.push_messages([message]) if message_id]
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields replies as they come, until there is one for each message or `timeout` seconds have passed since the first was sent."""
        begun, waiting = time.monotonic(), set[str]()
        for message in messages:
            waiting.update(self.push_messages([message]))
            yield from self._come(waiting)
        pause = FIRST_PAUSE
        while waiting and (timeout is None or time.monotonic() < begun + timeout):
            before = len(waiting)
            yield from self._come(waiting)
            pause = min(LONGEST_PAUSE, pause * GROWTH) if len(waiting) == before else FIRST_PAUSE
            if waiting:
                time.sleep(pause)

    def _come(self, waiting: set[str]) -> Iterator[Message]:
        for reply in self._grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply

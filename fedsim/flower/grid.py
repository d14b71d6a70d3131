"""A Flower Grid inside this process: no Ray, no sockets; a message is handled by the ClientApp when its reply is pulled.

Replies come one at a time, so a server that aggregates as they come never holds more than one cohort's factors. What a client raises
is a fault of the run here, not of a remote machine, and is passed on.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 0


class LocalGrid(Grid):
    """A Grid whose nodes, ids from 1, are this process's own: each has a Context here, and messages wait in `_pending` by id."""

    def __init__(self, nodes: int) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, RUN_ID, SERVER_NODE
        self._run = Run.create_empty(RUN_ID)
        self.contexts = {node: Context(RUN_ID, node, {}, RecordDict(), {}) for node in range(1, nodes + 1)}
        self._pending: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = uuid4().hex
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def forget(self, message_ids: Iterable[str]) -> None:
        """Lets go of messages whose replies nobody waits for any more."""
        for message_id in message_ids:
            self._pending.pop(message_id, None)


class InProcessGrid(LocalGrid):
    """Hands messages for `workers` nodes to one ClientApp in the same process, each node with its own Context."""

    def __init__(self, client_app: ClientApp, workers: int = 1) -> None:
        super().__init__(workers)
        self._app = client_app

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handles the first of the given messages that is still waiting, and returns its reply."""
        for message_id in message_ids:
            if message_id in self._pending:
                return [self._handle(self._pending.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields each reply as soon as it is there; a message is made only when its turn comes. Nothing times out in one process."""
        for message in messages:
            yield from self.pull_messages(self.push_messages([message]))

    def _handle(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        own = Message(_copy(message.content), metadata=message.metadata)  # type: ignore[call-overload]  # as Flower itself rebuilds them
        return self._app(own, context)


class WatchedGrid(Grid):
    """Another Grid whose replies are shown to an observer as they come."""

    def __init__(self, grid: Grid, look: Callable[[Message], None]) -> None:
        self._grid, self._look = grid, look

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(self, *args: Any, **named: Any) -> Message:
        return self._grid.create_message(*args, **named)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self._shown(self._grid.pull_messages(message_ids)))

    def forget(self, message_ids: Iterable[str]) -> None:
        forget(self._grid, message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        return self._shown(self._grid.send_and_receive(messages, timeout=timeout))

    def _shown(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            self._look(reply)
            yield reply


def forget(grid: Grid, message_ids: Iterable[str]) -> None:
    """Tells a Grid of this process that nobody waits for these replies any more. To a SuperLink a message's time to live says it."""
    if isinstance(grid, (LocalGrid, WatchedGrid)):
        grid.forget(message_ids)


def _copy(content: RecordDict) -> RecordDict:
    """A strategy may put one record into many messages: each node gets its own (arrays share their immutable bytes)."""
    return RecordDict(
        {
            name: ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else type(record)(dict(record))  # type: ignore[arg-type]
            for name, record in content.items()
        }
    )

"""A Flower Grid inside this process: no Ray, no sockets; the ClientApp handles a message when its reply is pulled.

Replies come one at a time, so a server that aggregates them on arrival never holds more than one cohort's factors. An exception in a
client is a fault of this run, not of a remote machine, and propagates.
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
    """A Grid whose nodes, with ids from 1, belong to this process: it holds their Contexts, and queues messages in `_pending` by id."""

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
        """Drops messages whose replies are no longer awaited."""
        for message_id in message_ids:
            self._pending.pop(message_id, None)


class InProcessGrid(LocalGrid):
    """Hands messages for `workers` nodes to one ClientApp in the same process, each node with its own Context."""

    def __init__(self, client_app: ClientApp, workers: int = 1) -> None:
        super().__init__(workers)
        self._app = client_app

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handles the first of the given messages that is still pending and returns its reply."""
        for message_id in message_ids:
            if message_id in self._pending:
                return [self._handle(self._pending.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields each reply as soon as it is ready; messages are made lazily. Nothing times out in one process."""
        for message in messages:
            yield from self.pull_messages(self.push_messages([message]))

    def _handle(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        own = Message(_copy(message.content), metadata=message.metadata)  # type: ignore[call-overload]  # as Flower rebuilds messages
        return self._app(own, context)


class WatchedGrid(Grid):
    """Wraps another Grid and passes each reply to an observer as it arrives."""

    def __init__(self, grid: Grid, observe: Callable[[Message], None]) -> None:
        self._grid, self._observe = grid, observe

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
        return list(self._observed(self._grid.pull_messages(message_ids)))

    def forget(self, message_ids: Iterable[str]) -> None:
        forget(self._grid, message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        return self._observed(self._grid.send_and_receive(messages, timeout=timeout))

    def _observed(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            self._observe(reply)
            yield reply


def forget(grid: Grid, message_ids: Iterable[str]) -> None:
    """Makes a Grid of this process drop messages whose replies are no longer awaited; at a SuperLink their time to live does."""
    if isinstance(grid, (LocalGrid, WatchedGrid)):
        grid.forget(message_ids)


def _copy(content: RecordDict) -> RecordDict:
    """Returns a node's own copy, as a strategy may share one record among messages (arrays share their immutable bytes)."""
    return RecordDict(
        {
            name: ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else type(record)(dict(record))  # type: ignore[arg-type]
            for name, record in content.items()
        }
    )

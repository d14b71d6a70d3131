"""A Flower Grid over Ray actors: one actor per GPU or core, on this machine or a Ray cluster, each training one cohort per message.

The actors are those of Flower's simulation runtime (`flwr.simulation.ray_transport`). Its entry point `run_simulation` is deprecated and
runs a ServerApp in a thread; here the usual server drives the actors through the Grid interface. An actor is a node: it lives as long as
the run and keeps the base model loaded for its first message. Contexts stay with the Grid and travel with the messages, so nothing is
lost when an actor dies: its message is answered with an error, and a new actor replaces it.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from logging import ERROR
from math import ceil
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedsim.config import EngineConfig
from fedsim.errors import UserError
from fedsim.flower.grid import RUN_ID, LocalGrid
from fedsim.memory import give_back_gpu_memory

LOOK_SECONDS = 1.0
"""How long one poll waits for the first reply; `gathered` then polls again at once."""
CONNECT_SECONDS = 5.0
"""Timeout for connecting to a cluster's address."""

_FAILED = 1  # error code of a failed reply


class InActor:
    """Gives an actor its ClientApp, and its task identity, which Flower needs before a message is made.

    Actor and server may share a GPU: neither keeps unused memory while the other works.
    """

    def __init__(self, load: Callable[[], ClientApp], node: int) -> None:
        self._load, self._node = load, node

    def __call__(self) -> Callable[[Message, Context], Message]:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, RUN_ID, self._node
        app = self._load()

        def handled(message: Message, context: Context) -> Message:
            try:
                return app(message, context)
            finally:
                give_back_gpu_memory()

        return handled


class RayGrid(LocalGrid):
    """Nodes 1 to n are actors; a node works on one message at a time. `load` returns the ClientApp and must be importable.

    Raises UserError if Ray is missing or has no room for the actors. Must be closed, after which none of its processes is left.
    """

    def __init__(self, load: Callable[[], ClientApp], engine: EngineConfig) -> None:
        self._ray, self._load = _connect(engine), load
        actors, self._resources = _allocate(self._ray, engine)
        super().__init__(actors)
        self._actors: dict[int, Any] = {node: self._new_actor() for node in self.contexts}
        self._running: dict[Any, tuple[str, Message]] = {}  # by Ray's reference to the future reply
        self._ready: dict[str, Message] = {}  # replies not pulled yet, by message id
        self._forgotten: set[str] = set()  # messages in progress whose replies are no longer awaited

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the actors, and stops Ray on this machine unless it is a cluster that was already running."""
        for actor in self._actors.values():
            with suppress(Exception):  # it may be dead already
                self._ray.kill(actor)
        self._ray.shutdown()

    def _new_actor(self) -> Any:
        from flwr.simulation.ray_transport.ray_actor import ClientAppActor

        return ClientAppActor.options(**self._resources).remote()  # type: ignore[attr-defined]  # made by ray.remote

    # ---- Flower's Grid

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = super().push_messages(messages)
        give_back_gpu_memory()
        self._submit()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that are ready; waits up to `LOOK_SECONDS` for the first."""
        wanted = set(message_ids)
        if self._running and not wanted & set(self._ready):
            self._ray.wait(list(self._running), timeout=LOOK_SECONDS)
        self._collect()
        return [self._ready.pop(message_id) for message_id in [*self._ready] if message_id in wanted]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drops these messages; an actor finishes the one it is working on and then takes its next."""
        ids = set(message_ids)
        super().forget(ids)
        for message_id in ids:
            self._ready.pop(message_id, None)
        self._forgotten |= ids & {message_id for message_id, _ in self._running.values()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields replies as they arrive, for Flower's own strategies."""
        waiting = set(self.push_messages(messages))
        looks = 0
        while waiting and (timeout is None or looks * LOOK_SECONDS < timeout):
            looks += 1
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply

    # ---- actors

    def _collect(self) -> None:
        """Collects finished replies and gives idle nodes their next messages."""
        if self._running:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for reference in ready:
                message_id = self._running[reference][0]
                reply = self._reply(reference)
                if message_id in self._forgotten:
                    self._forgotten.remove(message_id)
                else:
                    self._ready[message_id] = reply
        self._submit()

    def _submit(self) -> None:
        """Gives each idle node its next message."""
        busy = {message.metadata.dst_node_id for _, message in self._running.values()}
        for message_id, message in list(self._pending.items()):
            node = message.metadata.dst_node_id
            if node not in busy:
                busy.add(node)
                del self._pending[message_id]
                reference = self._actors[node].run.remote(InActor(self._load, node), message, str(node), self.contexts[node])
                self._running[reference] = message_id, message

    def _reply(self, reference: Any) -> Message:
        _, message = self._running.pop(reference)
        node = message.metadata.dst_node_id
        try:
            _, reply, self.contexts[node] = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._actors[node] = self._new_actor()
            return Message(Error(_FAILED, f"its worker process is gone ({type(error).__name__})"), reply_to=message)
        except Exception as error:
            return Message(Error(_FAILED, _cause(error)), reply_to=message)
        return reply


def _cause(error: BaseException) -> str:
    """Returns the client's error message, which Ray wraps in the text of a whole traceback."""
    text = str(getattr(error, "cause", None) or error).strip()
    return text.splitlines()[-1][:300] if text else type(error).__name__


def _connect(engine: EngineConfig) -> Any:
    """Returns the module ray, connected. Raises UserError if Ray is not installed or no cluster is at the address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine=ray: expected Ray, which is not installed; pip install -e '.[simulation]', or use engine=inprocess."
        ) from None
    if engine.address:
        _check_reachable(engine.address)
    options: dict[str, Any] = {"address": engine.address} if engine.address else {"include_dashboard": False}
    if engine.actors and not engine.address:
        options["num_cpus"] = engine.actors
    path = os.pathsep.join(each for each in sys.path if each)
    try:
        ray.init(**options, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False, logging_level=ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"engine.address: no Ray cluster at {engine.address!r}: {str(error).splitlines()[0]:.200}") from None
    return ray


def _check_reachable(address: str) -> None:
    """Raises UserError if nothing listens at HOST:PORT, where Ray would retry for minutes. Names such as auto are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"engine.address: no Ray cluster at {address!r}: {error}. Start one with `ray start --head`.") from error


def _allocate(ray: Any, engine: EngineConfig) -> tuple[int, dict[str, float]]:
    """Returns the number of actors and the resources of each: a core, and a GPU or a share of one if there are GPUs."""
    found = ray.cluster_resources()
    cpus, gpus = int(found.get("CPU", 1)), int(found.get("GPU", 0))
    actors = engine.actors or gpus or cpus
    if actors > cpus:
        ray.shutdown()
        raise UserError(f"engine.actors: expected at most the {cpus} cores of the Ray cluster, got {actors}; lower it or leave it out.")
    return actors, {"num_cpus": 1, "num_gpus": gpu_share(actors, gpus)}


def gpu_share(actors: int, gpus: int) -> float:
    """Returns the share of a GPU per actor at which all actors fit: Ray never splits an actor across two GPUs."""
    return 1 / ceil(actors / gpus) if gpus else 0.0

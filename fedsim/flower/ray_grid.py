"""A Flower Grid over Ray actors: one actor per GPU or core, on this machine or on a Ray cluster, each training a cohort per message.

The actors are those of Flower's simulation runtime (`flwr.simulation.ray_transport`). Its own entry, `run_simulation`, is deprecated
and runs a ServerApp in a thread; here the same server as everywhere drives the actors through the one seam, a Grid. An actor is a node:
it lives as long as the run and keeps the base model that the first message made it load. The Contexts stay with the Grid and travel with
the messages, so an actor that dies takes nothing with it: its message is answered by an error, and a new actor takes its place.
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
"""How long one look for replies waits for the first of them; `gathered` then looks again at once."""
CONNECT_SECONDS = 5.0
"""How long a cluster's address may take to answer."""

_FAILED = 1  # code of the error in place of a reply


class InActor:
    """Gives an actor its ClientApp; Flower wants to know who it is before a message is made.

    Actor and server may have one GPU: neither keeps memory while the other works.
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
    """Nodes 1 to n are actors; a node works on one message at a time. `load` returns the ClientApp, in an importable module.

    Raises UserError where Ray is missing, or has no room for the actors. To be closed: then no process of it is left.
    """

    def __init__(self, load: Callable[[], ClientApp], engine: EngineConfig) -> None:
        self._ray, self._load = _started(engine), load
        actors, self._resources = _room(self._ray, engine)
        super().__init__(actors)
        self._actors: dict[int, Any] = {node: self._new_actor() for node in self.contexts}
        self._running: dict[Any, tuple[str, Message]] = {}  # by Ray's reference to the reply to come
        self._there: dict[str, Message] = {}  # replies that have come and were not asked for yet, by the message's id
        self._forgotten: set[str] = set()  # messages that are worked on though nobody waits for their replies

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors, and Ray on this machine unless it is a cluster that was there before."""
        for actor in self._actors.values():
            with suppress(Exception):  # one that is dead already
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
        """Returns the replies that are there; waits `LOOK_SECONDS` for the first."""
        wanted = set(message_ids)
        if self._running and not wanted & set(self._there):
            self._ray.wait(list(self._running), timeout=LOOK_SECONDS)
        self._take()
        return [self._there.pop(message_id) for message_id in [*self._there] if message_id in wanted]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Lets go of these messages; what an actor works on already it ends, and then has its next one."""
        ids = set(message_ids)
        super().forget(ids)
        for message_id in ids:
            self._there.pop(message_id, None)
        self._forgotten |= ids & {message_id for message_id, _ in self._running.values()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yields replies as they come, as Flower's own strategies want them."""
        waiting = set(self.push_messages(messages))
        looks = 0
        while waiting and (timeout is None or looks * LOOK_SECONDS < timeout):
            looks += 1
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply

    # ---- actors

    def _take(self) -> None:
        """Takes in what has been answered, and gives the nodes that are idle now their next messages."""
        if self._running:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for reference in ready:
                message_id = self._running[reference][0]
                reply = self._reply(reference)
                if message_id in self._forgotten:
                    self._forgotten.remove(message_id)
                else:
                    self._there[message_id] = reply
        self._submit()

    def _submit(self) -> None:
        """Gives each node that is idle its next message."""
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
    """Returns what the client raised: Ray wraps it, with a whole traceback in its text."""
    text = str(getattr(error, "cause", None) or error).strip()
    return text.splitlines()[-1][:300] if text else type(error).__name__


def _started(engine: EngineConfig) -> Any:
    """Returns the module ray, connected. Raises UserError where there is none, or no cluster at the address."""
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
    """Raises UserError if nobody listens at HOST:PORT; Ray itself would try for minutes. Names such as auto are Ray's to look up."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"engine.address: no Ray cluster at {address!r}: {error}. Start one with `ray start --head`.") from error


def _room(ray: Any, engine: EngineConfig) -> tuple[int, dict[str, float]]:
    """Returns the number of actors, and what each of them takes: a GPU or its part where there are GPUs, a core."""
    found = ray.cluster_resources()
    cpus, gpus = int(found.get("CPU", 1)), int(found.get("GPU", 0))
    actors = engine.actors or gpus or cpus
    if actors > cpus:
        ray.shutdown()
        raise UserError(f"engine.actors: expected at most the {cpus} cores of the Ray cluster, got {actors}; lower it or leave it out.")
    return actors, {"num_cpus": 1, "num_gpus": gpu_share(actors, gpus)}


def gpu_share(actors: int, gpus: int) -> float:
    """Returns what each actor takes of a GPU so that all of them find room: Ray gives no actor a bit of one GPU and a bit of another."""
    return 1 / ceil(actors / gpus) if gpus else 0.0

"""Buffered asynchronous aggregation (FedBuff, Nguyen et al., arXiv 2106.06639) over simulated time.

A fixed number of clients train at any time, each from the version of the global factors that it was sent. The server buffers updates as
they arrive; every K-th arrival makes a new version from the buffer, in which an update that is t versions old is scaled by 1 / sqrt(1 + t).
A client that finishes is replaced at once by another, drawn from the seed. A client trains from each version at most once: if no other
client is free, its slot stays empty until the next version.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.seeding import numpy_generator


def staleness_weight(versions: int) -> float:
    """Returns 1 / sqrt(1 + tau) for an update that is `versions` behind."""
    return float((1 + versions) ** -0.5)


@dataclass(frozen=True, order=True)
class Job:
    """One client's training from `version`, which ends at time `finish`; `number` counts all jobs of a run."""

    finish: float
    number: int
    client: int
    version: int
    vanishes: bool = False  # nothing arrives; its slot becomes free when the update was due


@dataclass
class Queue:
    """The running jobs, stored whole in a checkpoint. Later jobs depend only on it, the seed and the clients' times."""

    time: float = 0.0
    num_jobs: int = 0
    working: list[Job] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; lossless."""
        jobs = [[job.finish, job.number, job.client, job.version, job.vanishes] for job in sorted(self.working)]
        return {"time": self.time, "num_jobs": self.num_jobs, "working": jobs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Queue":
        """Returns the queue that `to_json` was called on."""
        return cls(value["time"], value["num_jobs"], [Job(*job) for job in value["working"]])


@dataclass
class Update:
    """A client's upload, computed by the simulation when its job begins."""

    num_examples: int
    num_tokens: int
    loss: float
    change: Tensor  # of the uploaded factors, from the version that the client was sent
    sent: list[dict[str, int | str]] = field(default_factory=list)  # rows of the ledger, charged when it arrives


@dataclass
class Buffer:
    """Everything in flight between two versions."""

    queue: Queue = field(default_factory=Queue)
    updates: dict[int, Update] = field(default_factory=dict)  # by job number: a client may start its next job when its update arrives

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; the tensors are in `changes`."""
        fields = {number: [each.num_examples, each.num_tokens, each.loss, each.sent] for number, each in self.updates.items()}
        return {"queue": self.queue.to_json(), "updates": fields}

    def changes(self) -> dict[str, Tensor]:
        """Returns the changes of all updates, by job number."""
        return {str(number): each.change for number, each in self.updates.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any], changes: dict[str, Tensor]) -> "Buffer":
        """Returns the buffer that `to_json` and `changes` were called on."""
        updates = {
            int(number): Update(examples, tokens, loss, changes[number], sent)
            for number, (examples, tokens, loss, sent) in value["updates"].items()
        }
        return cls(Queue.from_json(value["queue"]), updates)


@dataclass(frozen=True)
class Flush:
    """What happens between two versions: the jobs that begin, those whose updates fill the buffer, and those that are lost."""

    begun: tuple[Job, ...]
    arrived: tuple[Job, ...]
    lost: tuple[Job, ...]


def advance(
    queue: Queue,
    version: int,
    clients: Sequence[int],
    concurrency: int,
    buffer: int,
    seconds: Callable[[int], float],  # the client's time for a job
    vanishes: Callable[[int], bool],
    seed: int,
) -> Flush:
    """Advances the queue to the time at which the version's buffer is full, and returns what happened.

    Jobs that finish at the same time arrive, in their order, before new ones begin. The buffer stays short only if no client is left to
    fill it.
    """
    begun: list[Job] = []
    arrived: list[Job] = []
    lost: list[Job] = []

    def start_jobs() -> None:
        """Fills free slots with clients that are not training and have not trained from this version."""
        while len(queue.working) < concurrency:
            busy = {job.client for job in (*queue.working, *begun)}
            free = [client for client in clients if client not in busy]
            if not free:
                return
            client = free[int(numpy_generator(seed, "job", queue.num_jobs).integers(len(free)))]
            job = Job(queue.time + seconds(client), queue.num_jobs, client, version, vanishes(client))
            queue.num_jobs += 1
            heapq.heappush(queue.working, job)
            begun.append(job)

    heapq.heapify(queue.working)
    start_jobs()
    while queue.working and len(arrived) < buffer:
        queue.time = queue.working[0].finish
        while queue.working and queue.working[0].finish == queue.time and len(arrived) < buffer:
            job = heapq.heappop(queue.working)
            (lost if job.vanishes else arrived).append(job)
        if len(arrived) < buffer:
            start_jobs()
    return Flush(tuple(begun), tuple(arrived), tuple(lost))

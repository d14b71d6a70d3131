"""Clients that drop out during a round: a function of seed, round and client.

A client fails before its upload arrives with probability `federation.dropout`. With secure aggregation it does so at one of three stages,
and a client whose upload has arrived fails with the same probability before the unmasking. The same uploads are lost either way.
"""

from collections.abc import Sequence
from enum import IntEnum

from fedsim.config import Config
from fedsim.core.secure_aggregation import Graph, complete
from fedsim.seeding import numpy_generator


class Stage(IntEnum):
    """What a client sends in a round, in order; without secure aggregation only the upload."""

    keys = 0
    shares = 1
    upload = 2
    unmasking = 3


Rates = Sequence[float] | None
"""Each client's own probability of vanishing in a round; None means `federation.dropout` for all."""


def vanishes(config: Config, server_round: int, client: int, rates: Rates = None) -> Stage | None:
    """Returns the first stage that the client does not reach in this round, None if it stays. In round 0, the set-up, all stay."""
    rate = config.federation.dropout if rates is None else rates[client]
    if not rate or not server_round:
        return None
    generator = numpy_generator(config.seed, "dropout", server_round, client)
    before, after = generator.random(2) < rate
    moment = Stage(int(generator.integers(3)))
    if not config.privacy.secure_aggregation:
        return Stage.upload if before else None
    return moment if before else Stage.unmasking if after else None


def responding(config: Config, server_round: int, clients: Sequence[int], stage: Stage = Stage.upload, rates: Rates = None) -> list[int]:
    """Returns the clients that still respond at this stage of the round."""
    moments = {client: vanishes(config, server_round, client, rates) for client in clients}
    return [client for client, moment in moments.items() if moment is None or moment > stage]


Attendance = dict[Stage, list[int]]
"""The clients that respond at each stage of a round of secure aggregation, up to the last stage that is reached."""


def attendance(config: Config, server_round: int, graph: Graph) -> Attendance:
    """Returns the clients that respond at each stage; the first stage with too few is the last. In round 0, the set-up, all respond."""
    found: Attendance = {}
    left = list(graph)
    for stage in Stage:
        left = found[stage] = responding(config, server_round, left, stage)
        if not enough_responding(config, graph, found, stage):
            break
    return found


def enough_responding(config: Config, graph: Graph, found: Attendance, stage: Stage) -> bool:
    """Whether enough clients respond at a stage; for the last one, whether there is a sum."""
    owners = found.get(stage if stage <= Stage.shares else Stage.shares)
    return stage in found and complete(graph, owners or [], found[stage], config.secure.threshold)

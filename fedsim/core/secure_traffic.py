"""The bytes that the secure aggregation protocol itself sends, computed from the clients that respond at each stage, to predict cost."""

from collections.abc import Iterator
from typing import NamedTuple

from fedsim.core.communication import Direction
from fedsim.core.dropout import Attendance, Stage
from fedsim.core.secret_sharing import SHARE_BYTES
from fedsim.core.secure_aggregation import KEY_BYTES, SEALED_BYTES, Graph

ID_BYTES = 8


class Sent(NamedTuple):
    """What one client sends or receives at a stage for the protocol itself."""

    client: int
    direction: Direction
    payload_bytes: int


def protocol_traffic(graph: Graph, responding: Attendance) -> Iterator[Sent]:
    """Yields every transfer of keys, sealed shares and unmasking, stage by stage as far as the round goes."""

    def among(client: int, here: set[int]) -> int:
        return len(here.intersection(graph[client]))

    here = {stage: set(clients) for stage, clients in responding.items()}
    for client in responding[Stage.keys]:
        yield Sent(client, Direction.uplink, 2 * KEY_BYTES)
    if Stage.shares in responding:
        for client in responding[Stage.keys]:
            yield Sent(client, Direction.downlink, among(client, here[Stage.keys]) * (ID_BYTES + 2 * KEY_BYTES))
        for client in responding[Stage.shares]:
            yield Sent(client, Direction.uplink, among(client, here[Stage.keys]) * SEALED_BYTES)
    if Stage.upload in responding:
        for client in responding[Stage.shares]:
            yield Sent(client, Direction.downlink, among(client, here[Stage.shares]) * (ID_BYTES + SEALED_BYTES))
    if Stage.unmasking in responding:
        owners = {client: 1 + among(client, here[Stage.shares]) for client in responding[Stage.upload]}
        for client in responding[Stage.upload]:
            yield Sent(client, Direction.downlink, owners[client] * ID_BYTES)
        for client in responding[Stage.unmasking]:
            yield Sent(client, Direction.uplink, owners[client] * SHARE_BYTES)

"""The server's side of secure aggregation over Flower messages: four stages, from which it keeps public keys, sealed shares and one sum.

    query.secure_keys     asks the participants for public keys and numbers of examples
    query.secure_shares   sends the neighbours' public keys, for shares of each client's secrets, sealed for its neighbours
    train...              sends the sealed shares along with the request for work, for masked uploads, which are summed on arrival
    query.secure_unmask   sends the survivors and the vanished, for shares of the survivors' own masks and of the vanished ones' keys

A client that does not respond at a stage is out. Below the threshold the sum is abandoned: `SumRefused`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import Config
from fedsim.core.communication import Direction, Purpose
from fedsim.core.compression import Shapes
from fedsim.core.dropout import Stage
from fedsim.core.missing import Missing, Reason
from fedsim.core.quantization import Quantizer
from fedsim.core.secret_sharing import SHARE_BYTES
from fedsim.core.secure_aggregation import (
    KEY_BYTES,
    SEALED_BYTES,
    Graph,
    MaskedSum,
    Public,
    complete,
    fewest_survivors,
    neighbour_graph,
)
from fedsim.errors import RunStopped
from fedsim.flower.asking import Ask
from fedsim.flower.charging import Charges
from fedsim.flower.gathering import Failure
from fedsim.flower.records import arrays_from_record, arrays_to_record, byte_rows, whole_numbers
from fedsim.flower.requests import METRICS, REQUEST
from fedsim.flower.secure_worker import KEYS, SHARES, UNMASK, secure_key
from fedsim.flower.worker import client_key

Cohorts = Sequence[tuple[int, list[int]]]
"""Node and clients of each message; the same in all stages, because a client's secrets stay at its node."""
Work = Callable[[list[int], dict[str, Any]], RecordDict]
"""Makes the request for uploads of some clients, with additional fields for secure aggregation."""


class SumRefused(RunStopped):
    """Too few clients were left for a sum that reveals no single one."""


@dataclass(frozen=True)
class Wanted:
    """What is summed: `parameters` numbers of the quantizer, followed by counters."""

    kind: str  # type of the message that asks for an upload
    purpose: Purpose
    quantizer: Quantizer
    parameters: int
    counters: int
    work: Work

    @property
    def entries(self) -> int:
        """Number of integers in an upload."""
        return self.parameters + self.counters * self.quantizer.digits


@dataclass(frozen=True)
class Summed:
    """A sum over the survivors as integers of the quantizer; `survivors` are in the order of arrival."""

    values: NDArray[np.int64]
    survivors: list[int]
    num_examples: dict[int, int]


@dataclass
class Protocol:
    """Runs the four stages over some clients: those in `cohorts` are asked, the others in `clients` count as not responding."""

    config: Config
    server_round: int
    clients: list[int]
    cohorts: Cohorts
    ask: Callable[[Iterable[Ask]], Iterator[tuple[Ask, Message | Failure]]]
    request: Callable[..., ConfigRecord]  # of (clients, **told)
    charges: Charges
    check_num_examples: Callable[[int, int], None]  # of (client, count); raises ValueError
    came: Callable[[int], None] = lambda client: None  # called with each client whose upload arrived
    told: dict[str, Any] = field(default_factory=dict)  # in every request

    def __post_init__(self) -> None:
        self._graph: Graph = neighbour_graph(self.clients, self.config.secure.neighbours, self.config.seed, self.server_round)
        self._responded: dict[Stage, list[int]] = {}
        self._failures: dict[int, Failure] = {}
        self._counts: dict[str, Any] = {}

    def carry_out(self, wanted: Wanted) -> Summed:
        """Returns the sum of the clients' uploads. Raises SumRefused if fewer than the threshold stay to the end."""
        self._counts = {"step": wanted.quantizer.step, "modulus_bits": 8 * wanted.quantizer.width}
        publics, counts = self._keys()
        self._check(Stage.keys, publics, publics)
        sealed = self._shares(publics)
        self._check(Stage.shares, sealed, sealed)
        total = self._uploads(wanted, sealed, max(counts.values()))
        self._check(Stage.upload, sealed, total.survivors)
        shares, answered = self._unmasking(sealed, total.survivors)
        self._check(Stage.unmasking, sealed, answered)
        masked_with = {owner: [peer for peer in self._graph[owner] if peer in sealed] for owner in sealed}
        thresholds = {owner: self._threshold(owner) for owner in sealed}
        try:
            found = total.unmasked(publics, masked_with, shares, thresholds)
        except ValueError as error:
            raise SumRefused(f"secure aggregation: the shares of round {self.server_round} do not open the sum: {error}") from error
        return Summed(wanted.quantizer.signed(found), total.survivors, counts)

    def count(self, **counts: int) -> None:
        """Adds counts derived from the sum to the facts."""
        self._counts |= counts

    def facts(self) -> dict[str, Any]:
        """Returns log facts: numbers of participants and of clients needed, the stage each vanished client missed, the quantizer's grid."""
        vanished: dict[str, str] = {}
        left = set(self.clients)
        for stage, here in self._responded.items():
            vanished |= {str(client): stage.name for client in sorted(left - set(here))}
            left = set(here)
        return {"participants": len(self.clients), "needed": self._needed, "vanished": vanished, **self._counts}

    def missing(self) -> list[Missing]:
        """Returns the clients missing from the sum, with reasons; after a refusal, those that did not respond."""
        stages = {int(client): name for client, name in self.facts()["vanished"].items() if name != Stage.unmasking.name}
        asked = {client for _, clients in self.cohorts for client in clients}
        found = []
        for client, stage in stages.items():
            silent = Failure(Reason.dropped_out, f"before its {stage}") if client in asked else Failure(Reason.died, "not connected")
            failure = self._failures.get(client, silent)
            found.append(Missing(client, self.server_round, failure.reason, failure.detail))
        return found

    # ---- the stages

    def _keys(self) -> tuple[dict[int, Public], dict[int, int]]:
        publics: dict[int, Public] = {}
        counts: dict[int, int] = {}

        def take(client: int, reply: Message) -> None:
            keys = self._received(client, reply, {"keys": (torch.uint8, (2 * KEY_BYTES,))})["keys"].numpy()
            counts[client] = self._num_examples(client, reply.content.metric_records[METRICS])
            publics[client] = bytes(keys[:KEY_BYTES]), bytes(keys[KEY_BYTES:])

        self._gather(KEYS, self._graph, lambda clients: {REQUEST: self._request(clients)}, take)
        return publics, counts

    def _shares(self, publics: Mapping[int, Public]) -> dict[int, dict[int, bytes]]:
        peers = {client: [peer for peer in self._graph[client] if peer in publics] for client in publics}
        sealed: dict[int, dict[int, bytes]] = {}

        def content(clients: list[int]) -> dict[str, ArrayRecord | ConfigRecord]:
            rows = {client: [b"".join(publics[peer]) for peer in peers[client]] for client in clients}
            records = {client: {"peers": _ids(peers[client]), "keys": byte_rows(rows[client], 2 * KEY_BYTES)} for client in clients}
            thresholds = [self._threshold(client) for client in clients]
            return {REQUEST: self._request(clients, thresholds=thresholds), **self._sent(records)}

        def take(client: int, reply: Message) -> None:
            rows = self._received(client, reply, {"sealed": (torch.uint8, (len(peers[client]), SEALED_BYTES))})["sealed"].numpy()
            sealed[client] = {peer: bytes(row) for peer, row in zip(peers[client], rows, strict=True)}

        self._gather(SHARES, publics, content, take)
        return sealed

    def _uploads(self, wanted: Wanted, sealed: Mapping[int, Mapping[int, bytes]], largest: int) -> MaskedSum:
        total = MaskedSum(wanted.entries)
        shapes: Shapes = {"masked": (torch.uint8, (wanted.entries, wanted.quantizer.width))}

        def content(clients: list[int]) -> dict[str, Any]:
            peers = {client: [peer for peer in self._graph[client] if peer in sealed] for client in clients}
            rows = {client: [sealed[peer][client] for peer in peers[client]] for client in clients}
            records = {client: {"peers": _ids(peers[client]), "sealed": byte_rows(rows[client], SEALED_BYTES)} for client in clients}
            told = {"largest": largest, "contributors": len(self._graph), **self.told}
            return {**wanted.work(clients, told), **self._sent(records)}

        def take(client: int, reply: Message) -> None:
            record = reply.content.array_records[client_key(client)]
            masked = self._read(client, wanted.purpose, record, shapes)["masked"].numpy()
            self.charges.up(self.server_round, client, wanted.purpose, wanted.parameters, record)
            total.add(client, wanted.quantizer.from_wire(masked))
            self.came(client)

        self._gather(wanted.kind, sealed, content, take)
        return total

    def _unmasking(self, sealed: Mapping[int, Any], survivors: Sequence[int]) -> tuple[dict[int, dict[int, bytes]], list[int]]:
        groups = {client: [member for member in sorted([client, *self._graph[client]]) if member in sealed] for client in survivors}
        came = set(survivors)
        survived = {client: [member for member in group if member in came] for client, group in groups.items()}
        vanished = {client: [member for member in group if member not in came] for client, group in groups.items()}
        shares: dict[int, dict[int, bytes]] = {owner: {} for owner in sealed}
        answered: list[int] = []

        def content(clients: list[int]) -> dict[str, ArrayRecord | ConfigRecord]:
            records = {client: {"survivors": _ids(survived[client]), "vanished": _ids(vanished[client])} for client in clients}
            return {REQUEST: self._request(clients), **self._sent(records)}

        def take(client: int, reply: Message) -> None:
            owners = [*survived[client], *vanished[client]]
            rows = self._received(client, reply, {"shares": (torch.uint8, (len(owners), SHARE_BYTES))})["shares"].numpy()
            answered.append(client)
            for owner, row in zip(owners, rows, strict=True):
                shares[owner][client] = bytes(row)

        self._gather(UNMASK, survivors, content, take)
        return shares, answered

    # ---- messages

    def _gather(
        self,
        kind: str,
        left: Iterable[int],
        content: Callable[[list[int]], dict[str, Any]],
        take: Callable[[int, Message], None],
    ) -> None:
        """Asks the clients in `left` at their nodes and calls `take` for each that answers; an invalid answer counts as a failure."""
        here = set(left)

        def asks() -> Iterator[Ask]:
            for node, clients in self.cohorts:
                asked = [client for client in clients if client in here]
                if asked:
                    yield Ask(Message(RecordDict(content(asked)), node, kind, group_id=str(self.server_round)), tuple(asked))

        for ask, reply in self.ask(asks()):
            if isinstance(reply, Failure):
                self._failures |= dict.fromkeys(ask.clients, reply)
                continue
            names = set(reply.content.array_records)
            for client in ask.clients:
                if names & {secure_key(client), client_key(client)}:
                    try:
                        take(client, reply)
                    except (KeyError, ValueError) as error:
                        self._failures[client] = Failure(Reason.refused_by_server, f"{kind}: {error}")

    def _request(self, clients: Sequence[int], **facts: Any) -> ConfigRecord:
        return self.request(clients, **self.told, **facts)

    def _sent(self, records: Mapping[int, dict[str, Tensor]]) -> dict[str, ArrayRecord]:
        made = {client: arrays_to_record(arrays) for client, arrays in records.items()}
        for client, record in made.items():
            self.charges.protocol(self.server_round, client, Direction.downlink, record)
        return {secure_key(client): record for client, record in made.items()}

    def _received(self, client: int, reply: Message, shapes: Shapes) -> dict[str, Tensor]:
        record = reply.content.array_records[secure_key(client)]
        arrays = self._read(client, Purpose.secure_aggregation, record, shapes)
        self.charges.protocol(self.server_round, client, Direction.uplink, record)
        return arrays

    def _read(self, client: int, purpose: Purpose, record: ArrayRecord, shapes: Shapes) -> dict[str, Tensor]:
        """Returns the arrays of a record. Raises ValueError for an unreadable one, after charging its bytes."""
        try:
            return arrays_from_record(record, shapes)
        except ValueError:
            self.charges.unread(self.server_round, client, purpose, record)
            raise

    def _num_examples(self, client: int, metrics: MetricRecord) -> int:
        """Raises KeyError or ValueError if the number is missing or implausible: the largest number scales every client's weight."""
        columns = whole_numbers(metrics, "clients"), whole_numbers(metrics, "num_examples")
        count = dict(zip(*columns, strict=True))[client]
        self.check_num_examples(client, count)
        return count

    # ---- thresholds

    @property
    def _needed(self) -> int:
        return fewest_survivors(len(self.clients), self.config.secure.threshold)

    def _threshold(self, client: int) -> int:
        return fewest_survivors(len(self._graph[client]) + 1, self.config.secure.threshold)

    def _check(self, stage: Stage, owners: Iterable[int], left: Iterable[int]) -> None:
        self._responded[stage] = present = list(left)
        threshold = self.config.secure.threshold
        if complete(self._graph, list(owners), present, threshold):
            return
        few = len(present) < self._needed
        of_all = f"{self._needed} of {len(self.clients)} clients" if few else f"{threshold:g} of every group of neighbours, all connected,"
        raise SumRefused(
            f"secure.threshold: round {self.server_round} needs {of_all} to the end, got {len(present)} that sent their "
            f"{stage.name}; nothing was unmasked. Lower secure.threshold (above 0.5), or take more clients into a round."
            + (" A client that has diverged sends none: a lower training.learning_rate helps there." if stage is Stage.upload else "")
        )


def _ids(clients: Sequence[int]) -> Tensor:
    return torch.tensor(clients, dtype=torch.int64)

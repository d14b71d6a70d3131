"""A round in progress: consumes replies as they arrive, and records every client missing from the result with the reason."""

from collections.abc import Collection, Iterable, Sequence

import torch
from flwr.app import Message

from fedsim.core.communication import Purpose
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing, Reason
from fedsim.flower.aggregation import Aggregation
from fedsim.flower.asking import Ask, Asking
from fedsim.flower.charging import Charges
from fedsim.flower.facts import RoundFacts
from fedsim.flower.gathering import Failure
from fedsim.flower.reading import Reader
from fedsim.flower.records import from_record, record_of
from fedsim.flower.worker import client_key
from fedsim.session import Session
from fedsim.types import Adapter

RETRYABLE = (Reason.timeout, Reason.died)
"""Reasons after which a client is asked again; one that refused or was refused would only do the same again."""


class Round:
    """Consumes replies until `wanted` clients are in the result."""

    def __init__(self, asking: Asking, server_round: int, wanted: int) -> None:
        self._asking, self._round, self._wanted = asking, server_round, wanted
        self.facts = RoundFacts()

    @property
    def full(self) -> bool:
        """Whether the result has as many clients as wanted."""
        return len(self.facts.clients) >= self._wanted

    def take(self, replies: Iterable[tuple[Ask, Message | Failure]]) -> None:
        """Consumes replies, one client at a time."""
        for ask, reply in replies:
            if isinstance(reply, Failure):
                self._record_missing(ask.clients, reply.reason, reply.detail)
            else:
                self._asking.confirmed(ask)
                self._use(ask, reply)

    def note_absent(self, asked: Sequence[int]) -> None:
        """Records the asked clients without a reply or failure as missing, unless the round is full."""
        if not self.full:
            self.facts.add_unreported(asked, self._round)

    def pop_retryable(self) -> list[int]:
        """Returns the missing clients that may yet reply, and removes them from `facts.missing`."""
        retried = [each for each in self.facts.missing if each.reason in RETRYABLE]
        self.facts.missing = [each for each in self.facts.missing if each not in retried]
        return sorted(each.client for each in retried)

    def _use(self, ask: Ask, reply: Message) -> None:
        raise NotImplementedError

    def _record_missing(self, clients: Iterable[int], reason: Reason, detail: str) -> None:
        self.facts.missing += [Missing(client, self._round, reason, detail) for client in clients]


class TrainingRound(Round):
    """One round of training; weights are renormalised over the clients in its result.

    `in_time` are the clients whose replies arrive in time on a simulated network; None without one.
    """

    def __init__(
        self,
        session: Session,
        state: GlobalState,
        asking: Asking,
        charges: Charges,
        server_round: int,
        wanted: int,
        in_time: Collection[int] | None,
    ) -> None:
        super().__init__(asking, server_round, wanted)
        self._in_time = in_time
        self._reader = Reader(session, state, charges, server_round)
        self._aggregation = Aggregation(session, state, server_round, self.facts)

    def _use(self, ask: Ask, reply: Message) -> None:
        for upload in self._reader.uploads(ask, reply):
            if isinstance(upload, Missing):
                self.facts.missing.append(upload)
            elif self._in_time is not None and upload.client not in self._in_time:
                self._record_missing([upload.client], Reason.timeout, "too late on the simulated network")
            elif self.full:
                self._record_missing([upload.client], Reason.timeout, "not needed: enough others have replied")
            else:
                self._aggregation.add(upload)

    def finish(self) -> None:
        """Makes the next global state."""
        self._aggregation.finish()


class GradientRound(Round):
    """Sums the clients' weight gradients in float64, one client at a time."""

    def __init__(self, session: Session, asking: Asking, charges: Charges, server_round: int, wanted: int) -> None:
        super().__init__(asking, server_round, wanted)
        self._layout, self._charges = session.gradient_parts.layout, charges
        self._total = torch.zeros(self._layout.num_parameters, dtype=torch.float64)

    def _use(self, ask: Ask, reply: Message) -> None:
        (client,) = ask.clients
        size, records = self._layout.num_parameters, dict(reply.content.array_records)
        try:
            record = record_of(records, client_key(client))
            gradient = from_record(record, size)
        except ValueError as error:
            self._charges.all_unread(self._round, ask.clients, Purpose.initial_gradient, records)
            self._record_missing([client], Reason.refused_by_server, str(error)[:300])
            return
        self._total += gradient
        self.facts.clients.append(client)
        self._charges.up(self._round, client, Purpose.initial_gradient, size, record)

    def result(self) -> Adapter:
        """Returns the sum, split into its parts, as float32."""
        return self._layout.unpack(self._total.float())

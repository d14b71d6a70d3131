"""Reads replies at the server: everything is checked before it is used, and what fails a check is refused, never averaged."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedsim.choices import OverNorm, PrivacyUnit
from fedsim.core.communication import Purpose
from fedsim.core.compression import CODECS
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing, Reason
from fedsim.flower.asking import Ask, clip_norm
from fedsim.flower.charging import Charges
from fedsim.flower.records import (
    arrays_from_record,
    check_finite,
    from_record,
    numbers,
    record_of,
    unchecked_from_record,
    whole_number,
    whole_numbers,
)
from fedsim.flower.requests import METRICS
from fedsim.flower.worker import client_key, control_key
from fedsim.session import Session

DIVERGED = "Expected a finite training loss"
MOST = 2**53  # largest count accepted: float64 has every whole number up to it
SHORT = 1 << 20  # up to so many squares, a float32 sum can show that a norm is well below a bound, three times as fast as float64
CLEARLY = 0.9  # norms above this fraction of a bound are always computed in float64


@dataclass(frozen=True)
class Claim:
    """What a client reports about its training."""

    client: int
    num_examples: int
    num_tokens: int
    loss: float
    within: bool  # whether the update was within the clip norm of client-level privacy


@dataclass(frozen=True)
class Upload(Claim):
    """One client's reply to a request to train, checked and decompressed."""

    flat: Tensor  # the uploaded factors at `positions` of their flat array
    positions: Tensor | None = None  # None for all
    control: Tensor | None = None  # change of SCAFFOLD's control variate
    clipped: bool = False  # scaled down to server.max_update_norm
    distance: float | None = None  # of `flat` from the start of the round, if known


class Reader:
    """Reads the replies of one round and charges each client for what it sent; refused records as bytes without parameters."""

    def __init__(self, session: Session, state: GlobalState, charges: Charges, server_round: int) -> None:
        self._session, self._config, self._state, self._charges = session, session.config, state, charges
        self._round = server_round
        self._hidden = session.config.privacy.unit is PrivacyUnit.client  # facts about a single update without noise are not reported
        self._start = state.flat(session.method.uploaded(server_round))
        self._space = torch.empty_like(self._start)  # scratch space for differences

    def uploads(self, ask: Ask, reply: Message) -> Iterator[Upload | Missing]:
        """Yields one upload, or the reason for its absence, for each client of the request; holds one upload at a time.

        An upload is refused if it answers another round or for other clients, and for unexpected names, types, shapes or sizes, values
        that are not finite, counts out of bounds, or, by `server.over_norm`, an update beyond `server.max_update_norm`.
        """
        records = reply.content.array_records  # rebuilt by Flower on each access
        try:
            claims = self._claims(ask, reply)
        except ValueError as error:
            self._charges.all_unread(self._round, ask.clients, Purpose.adapter, records)
            yield from (self._refused(client, str(error)) for client in ask.clients)
            return
        for client in ask.clients:
            own = {name: records[name] for name in (client_key(client), control_key(client)) if name in records}
            try:
                found = self._upload(claims[client], own) if client in claims else Missing(client, self._round, Reason.dropped_out)
            except ValueError as error:
                found = self._refused(client, str(error))
            self._charges.all_unread(self._round, [client], Purpose.adapter, own)
            yield found

    def _refused(self, client: int, reason: str) -> Missing:
        return Missing(client, self._round, Reason.refused_by_server, reason[:300])

    def _claims(self, ask: Ask, reply: Message) -> dict[int, Claim]:
        """Returns the claims of the reply by client. Raises ValueError if it does not answer this request."""
        if reply.metadata.src_node_id != ask.message.metadata.dst_node_id:
            raise ValueError("Expected the reply of the node that was asked, got that of another.")
        _check_names(reply.content, ask.clients, control=self._state.control is not None)
        metrics = reply.content.metric_records[METRICS]
        if (answered := whole_number(metrics, "round")) != self._round:
            raise ValueError(f"Expected a reply to round {self._round}, got one to round {answered}: late or replayed.")
        names = ("clients", "num_examples", "num_tokens", "within")
        clients, examples, tokens, within = (whole_numbers(metrics, name) for name in names)
        losses = numbers(metrics, "loss")
        if len({len(column) for column in (clients, examples, tokens, within, losses)}) != 1:
            raise ValueError("Expected as many numbers as clients in every list of the reply.")
        if len(set(clients)) != len(clients) or not set(clients) <= set(ask.clients):
            raise ValueError(f"Expected a reply for clients {list(ask.clients)[:5]}, got one for {clients[:5]}.")
        return {row[0]: Claim(*row) for row in zip(clients, examples, tokens, losses, map(bool, within), strict=True)}

    def _upload(self, claim: Claim, own: dict[str, ArrayRecord]) -> Upload:
        """Returns the claim with its arrays, and removes the records it has charged from `own`.

        Raises ValueError for an upload to be refused.
        """
        self._check_counts(claim)
        positions = self._session.sent_positions(self._round, claim.client)
        start = self._start if positions is None else self._start[positions]
        flat = self._flat(claim.client, own, start)
        distance = _distance(flat, start, self._space)
        self._charges.up(self._round, claim.client, Purpose.adapter, len(start), own.pop(client_key(claim.client)))
        bounded = self._bounded(flat, start, distance)
        if bounded is not flat:
            distance = _distance(bounded, start, self._space)
        clipped = bounded is not flat and not self._hidden
        control = None if self._state.control is None else self._control(claim.client, own)
        return Upload(**vars(claim), flat=bounded, positions=positions, control=control, clipped=clipped, distance=distance)

    def _check_counts(self, claim: Claim) -> None:
        self._session.check_num_examples(claim.client, claim.num_examples)
        if not 0 <= claim.num_tokens <= MOST:
            raise ValueError(f"Expected a number of tokens, got {claim.num_tokens}.")
        if not isfinite(claim.loss) and self._config.privacy.unit is PrivacyUnit.none:
            raise ValueError(f"{DIVERGED}, got {claim.loss}.")

    def _flat(self, client: int, own: dict[str, ArrayRecord], start: Tensor) -> Tensor:
        """Returns a client's flat upload, decompressed."""
        record, options = record_of(own, client_key(client)), self._config.compression
        if options.name == "none":
            return unchecked_from_record(record, len(start))
        codec = CODECS[options.name]
        arrays = arrays_from_record(record, codec.shapes(len(start), options.density))
        return start + codec.decode(arrays, len(start), options.density)

    def _bounded(self, flat: Tensor, start: Tensor, distance: float) -> Tensor:
        """Returns the upload with its update scaled down to the bound. Raises ValueError for one beyond it with `server.over_norm=refuse`.

        With client-level privacy the bound is the clip norm, which honest updates never exceed, and nothing is refused.
        """
        most = clip_norm(self._session, self._state) if self._hidden else self._config.server.max_update_norm
        if most is None or (len(flat) <= SHORT and distance <= CLEARLY * most):
            return flat
        if (norm := float((flat.double() - start.double()).norm())) <= most:
            return flat
        if self._config.server.over_norm is OverNorm.refuse and not self._hidden:
            raise ValueError(f"Expected an update of norm {most:g} at most (server.max_update_norm), got {norm:.3g}.")
        return (start.double() + (flat.double() - start.double()) * (most / norm)).float()

    def _control(self, client: int, own: dict[str, ArrayRecord]) -> Tensor:
        change = from_record(record_of(own, control_key(client)), len(self._start))
        self._charges.up(self._round, client, Purpose.control, len(self._start), own.pop(control_key(client)))
        most, norm = self._config.server.max_update_norm, float(change.double().norm())
        if most is not None and norm > most:
            raise ValueError(f"Expected a change of the control variate of norm {most:g} at most (server.max_update_norm), got {norm:.3g}.")
        return change


def _distance(flat: Tensor, start: Tensor, space: Tensor) -> float:
    """Returns |flat - start| summed in float32; the difference is written to `space`.

    Raises ValueError if a value is not finite, as then the distance is not either.
    """
    difference = torch.sub(flat, start, out=space[: len(flat)])
    distance = sqrt(float(difference @ difference))  # twice as fast as torch.dist
    if not isfinite(distance):  # large values overflow float32, but not float64
        distance = float((flat.double() - start.double()).norm())
        check_finite(distance)
    return distance


def _check_names(content: RecordDict, clients: tuple[int, ...], *, control: bool) -> None:
    """Raises ValueError unless the content is metrics and, apart from them, only arrays of these clients."""
    allowed = {client_key(client) for client in clients} | ({control_key(client) for client in clients} if control else set())
    if METRICS not in content.metric_records or content.config_records or not set(content.array_records) <= allowed:
        raise ValueError(f"Expected {METRICS!r} and arrays of the clients that were asked, got {sorted(content)[:5]!s:.100}.")

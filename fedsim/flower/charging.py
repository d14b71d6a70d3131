"""Charges the messages of a run: every transfer between the server and a client goes into the ledger as if the client were alone.

A cohort shares one message; each of its clients is charged for the parts it lacked and for what it sent. Only records of arrays are
charged, not their envelope (see `Transfer`), and nothing that never reached the server.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from flwr.app import ArrayRecord

from fedsim.core.communication import CommunicationLedger, Direction, Purpose, Transfer
from fedsim.core.compression import CODECS
from fedsim.core.exchange import CONTROL, WEIGHTS
from fedsim.core.global_state import GlobalState, folded_layout
from fedsim.core.traffic import down_sizes
from fedsim.flower.records import arrays_to_record, payload_bytes, serialized_bytes, size_of_floats
from fedsim.flower.worker import client_key, control_key
from fedsim.session import Session


class Charges:
    """Writes transfers into the ledger of a run; a pooled method transfers nothing and is never charged."""

    def __init__(self, session: Session, state: GlobalState, ledger: CommunicationLedger) -> None:
        self._session, self._state, self._ledger = session, state, ledger
        self._size = cache(session.spec.num_parameters)

    def down(self, server_round: int, client: int, parts: Sequence[str]) -> None:
        """Charges the client for the parts of the global state sent to it."""
        for purpose, size in self._records_down(client, parts):
            self._add(server_round, client, Direction.downlink, purpose, size, 4 * size, size_of_floats(size))

    def down_again(self, server_round: int, clients: Iterable[int]) -> None:
        """Charges the clients for the whole global state, sent again because their own workers had lost it."""
        whole = folded_layout(self._session.spec).num_parameters if self._state.folded else 0
        for client in clients:
            parts = [part for part in self._state.exchange.versions if part != WEIGHTS or whole]
            for purpose, size in self._records_down(client, parts, increment=whole):
                self._add(server_round, client, Direction.downlink, purpose, size, 4 * size, size_of_floats(size))

    def bytes_down(self, client: int) -> int:
        """Returns the bytes that `down` would charge the client for all parts it lacks now."""
        lacking = self._state.exchange.lacking(client)
        return 0 if self._session.method.pooled else sum(size_of_floats(size) for _, size in self._records_down(client, lacking))

    def bytes_up(self, server_round: int, client: int) -> int:
        """Returns the bytes that the client will be charged for its reply to a training request."""
        session, options = self._session, self._session.config.compression
        positions, uploaded = session.sent_positions(server_round, client), session.method.uploaded(server_round)
        size = self._size(uploaded) if positions is None else len(positions)
        control = 0 if self._state.control is None else size_of_floats(len(self._state.control))
        if options.name == "none" or session.method.pooled:
            return 0 if session.method.pooled else size_of_floats(size) + control
        shapes = CODECS[options.name].shapes(size, options.density)
        record = arrays_to_record({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()})
        return serialized_bytes(record) + control

    def _records_down(self, client: int, parts: Sequence[str], increment: int | None = None) -> Iterator[tuple[Purpose, int]]:
        """Returns purpose and number of parameters of each record that carries the parts to the client; `increment` is W's size if
        W is sent as an increment, by default that of the last one."""
        state, spec = self._state, self._session.spec
        rank, whole = self._session.client_rank(client), folded_layout(spec).num_parameters
        if increment is None:
            increment = sum(tensor.numel() for tensor in state.increment.values())
        control = len(state.control) if state.control is not None else 0

        def sizes(kinds: tuple[str, ...]) -> int:
            return control if kinds == (CONTROL,) else self._size(kinds, rank)

        return down_sizes(state.exchange, self._session.method.moving, client, parts, sizes, whole, increment)

    def up(self, server_round: int, client: int, purpose: Purpose, parameters: int, record: ArrayRecord) -> None:
        """Charges the client for a record it sent."""
        self._add(server_round, client, Direction.uplink, purpose, parameters, payload_bytes(record), serialized_bytes(record))

    def protocol(self, server_round: int, client: int, direction: Direction, record: ArrayRecord) -> None:
        """Charges the client for keys, shares or unmasking of secure aggregation, which hold no parameters."""
        self._add(server_round, client, direction, Purpose.secure_aggregation, 0, payload_bytes(record), serialized_bytes(record))

    def unread(self, server_round: int, client: int, purpose: Purpose, record: ArrayRecord) -> None:
        """Charges the client for the bytes of a refused record, with no parameters."""
        size = _raw_size(record)
        self._add(server_round, client, Direction.uplink, purpose, 0, size, size)

    def all_unread(self, server_round: int, clients: Sequence[int], purpose: Purpose, records: Mapping[str, ArrayRecord]) -> None:
        """Charges all records of a refused reply: each client for those with its name, the first client for the rest."""
        owners = {client_key(client): (client, purpose) for client in clients}
        owners |= {control_key(client): (client, Purpose.control) for client in clients}
        sizes: Counter[tuple[int, Purpose]] = Counter()
        for name, record in records.items():
            sizes[owners.get(name, (clients[0], purpose))] += _raw_size(record)
        for (client, of), size in sizes.items():
            self._add(server_round, client, Direction.uplink, of, 0, size, size)

    def _add(
        self, server_round: int, client: int, direction: Direction, purpose: Purpose, parameters: int, payload: int, size: int
    ) -> None:
        if not self._session.method.pooled:
            self._ledger.add(Transfer(server_round, client, direction, purpose, parameters, 4 * parameters, payload, size))


def _raw_size(record: ArrayRecord) -> int:
    """Returns the bytes of data in a record, whatever types and shapes it declares."""
    return sum(len(array.data) for array in record.values())

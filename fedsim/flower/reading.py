"""What the server makes of a reply: nothing in it is believed before it is checked; what fails is refused, never averaged."""

from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsim.core.communication import Purpose
from fedsim.core.compression import CODECS
from fedsim.core.global_state import GlobalState
from fedsim.flower.charging import Charges
from fedsim.flower.records import arrays_from_record, from_record, numbers, whole_numbers
from fedsim.flower.worker import client_key, control_key
from fedsim.session import Session


@dataclass(frozen=True)
class Upload:
    """One client's reply to a request to train, checked and decompressed."""

    client: int
    num_examples: int
    num_tokens: int
    loss: float
    within: bool  # whether the update was within the clip norm
    flat: Tensor  # the uploaded factors at `positions` of their flat array
    positions: Tensor | None  # None for all
    control: Tensor | None  # change of SCAFFOLD's control variate


class Reader:
    """Reads the replies of one round and charges each client for what it has sent."""

    def __init__(self, session: Session, state: GlobalState, charges: Charges, server_round: int) -> None:
        self._session, self._state, self._charges, self._round = session, state, charges, server_round
        self._start = session.spec.pack(state.factors, session.method.uploaded(server_round))

    def uploads(self, reply: Message) -> Iterator[Upload]:
        """Yields the uploads of the clients of a cohort, one at a time. Raises ValueError for what is not as it should be."""
        metrics, records = reply.content.metric_records["metrics"], reply.content.array_records  # made anew by Flower at each look
        names = ("clients", "num_examples", "num_tokens", "within")
        columns = [whole_numbers(metrics, name) for name in names]
        for client, num_examples, num_tokens, within, loss in zip(*columns, numbers(metrics, "loss"), strict=True):
            positions = self._session.sent_positions(self._round, client)
            flat = self._flat(client, records[client_key(client)], self._start if positions is None else self._start[positions])
            control = None if self._state.control is None else self._control(client, records[control_key(client)])
            yield Upload(client, num_examples, num_tokens, loss, bool(within), flat, positions, control)

    def _flat(self, client: int, record: ArrayRecord, start: Tensor) -> Tensor:
        """Returns a client's flat upload, decompressed."""
        self._charges.up(self._round, client, Purpose.adapter, len(start), record)
        options = self._session.config.compression
        if options.name == "none":
            return from_record(record, len(start))
        codec = CODECS[options.name]
        arrays = arrays_from_record(record, codec.shapes(len(start), options.density))
        return start + codec.decode(arrays, len(start), options.density)

    def _control(self, client: int, record: ArrayRecord) -> Tensor:
        self._charges.up(self._round, client, Purpose.control, len(self._start), record)
        return from_record(record, len(self._start))

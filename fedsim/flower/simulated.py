"""The simulated network: a client's time for a round, from the bytes it will be charged and the tokens it trains on.

All times are known before any client is asked, so who is late does not depend on the order in which the simulation trains the clients.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from fedsim.choices import PrivacyUnit
from fedsim.core.communication import Direction
from fedsim.core.dropout import vanishes
from fedsim.core.fedbuff import Flush, Queue, advance
from fedsim.core.global_state import GlobalState
from fedsim.core.network import Link, RoundEnd, round_end
from fedsim.core.participation import buffer_size, concurrency, steps_per_round
from fedsim.flower.charging import Charges
from fedsim.session import Session
from fedsim.training.batches import local_batches


def set_up_seconds(links: Sequence[Link] | None, rows: Iterable[dict[str, Any]]) -> float:
    """Returns the slowest client's time for the set-up transfers in these rows of the ledger; 0 without links."""
    moved: dict[int, dict[str, int]] = {}
    for row in rows if links else ():
        sums = moved.setdefault(row["client"], {each.name: 0 for each in Direction})
        sums[row["direction"]] += row["serialized_bytes"]
    times = [links[client].seconds(sums["downlink"], 0, sums["uplink"]) for client, sums in moved.items()] if links else []
    return max(times, default=0.0)


class Simulation:
    """Simulates the times of clients with links."""

    def __init__(self, session: Session, state: GlobalState, charges: Charges, links: Sequence[Link]) -> None:
        self._session, self._config, self._state, self._charges, self._links = session, session.config, state, charges, links
        self._next_flush: tuple[int, Flush, Queue] | None = None

    def seconds(self, server_round: int, client: int) -> float:
        """Returns the seconds from the server's message to the client's reply in a round that begins now."""
        down, up = self._charges.bytes_down(client), self._charges.bytes_up(server_round, client)
        return self._links[client].seconds(down, self._tokens(server_round, client), up)

    def stays(self, server_round: int, client: int) -> bool:
        """Whether the client does not drop out in the round."""
        return vanishes(self._config, server_round, client, self._session.dropouts) is None

    def round_end(self, server_round: int, asked: Sequence[int], wanted: int, least: int) -> RoundEnd:
        """Returns when a synchronous round over the asked clients ends, and whose replies arrive by then."""
        seconds = {client: self.seconds(server_round, client) for client in asked if self.stays(server_round, client)}
        return round_end(seconds, wanted, least, self._config.federation.deadline)

    def flush(self, server_round: int) -> tuple[Flush, Queue]:
        """Returns the events up to the next flush of the buffer, and the queue after it. Changes nothing."""
        if self._next_flush is None or self._next_flush[0] != server_round:
            federation, queue = self._config.federation, deepcopy(self._state.buffer.queue)
            flush = advance(
                queue,
                server_round - 1,
                range(federation.clients),
                concurrency(federation),
                buffer_size(federation),
                lambda client: self.seconds(server_round, client),
                lambda client: not self.stays(server_round, client),
                self._config.seed,
            )
            self._next_flush = (server_round, flush, queue)
        return self._next_flush[1:]

    def _tokens(self, server_round: int, client: int) -> float:
        """Returns the tokens of a client's local steps; with privacy, which withholds them, those of full batches of longest examples."""
        training, lengths = self._config.training, self._session.client_data(client).lengths
        if self._config.privacy.unit is not PrivacyUnit.none:
            batch = min(len(lengths), training.batch_size * training.accumulation)
            return steps_per_round(len(lengths), training) * batch * self._config.data.max_length
        batches = local_batches(lengths, training, seed=self._config.seed, round=server_round, client=client)
        return sum(lengths[place] for batch in batches for place in batch)

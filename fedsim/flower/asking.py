"""Makes the server's requests: who takes part in a round, which worker handles which clients, and what each message carries.

Messages are addressed to workers (Flower nodes) and name the clients that a worker handles. Participants are drawn from the run's
seed and the round, never from node ids.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import ceil
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.choices import PrivacyUnit
from fedsim.config import Config
from fedsim.core.communication import Direction
from fedsim.core.exchange import WEIGHTS
from fedsim.core.global_state import GlobalState
from fedsim.core.methods import Method
from fedsim.core.participation import central_privacy, drawn, spares
from fedsim.errors import UserError
from fedsim.flower.charging import Charges
from fedsim.flower.in_flight import TRAINING, InFlight
from fedsim.flower.requests import REQUEST
from fedsim.flower.secure_worker import secure_key
from fedsim.flower.transfer import ADAPTER, BASES, FOLD, Packer
from fedsim.flower.worker import EVALUATE, TRAIN
from fedsim.plain import to_dict
from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.session import Session

ClientNodes = Callable[[Sequence[int]], dict[int, int]]
"""Returns the own node of each of these clients in a deployment; clients that are not connected are left out."""


@dataclass(frozen=True)
class Ask:
    """One message to a worker and the clients it names."""

    message: Message
    clients: tuple[int, ...]


class Asking:
    """Makes the requests of a run and charges each client, when its message is made, for the parts of the global state it lacks."""

    def __init__(
        self,
        session: Session,
        config: Config,
        state: GlobalState,
        charges: Charges,
        privacy: PrivacyLedger | None,
        client_nodes: ClientNodes | None,
        in_flight: InFlight,
    ) -> None:
        self._session, self._state, self._charges, self._privacy, self.client_nodes = session, state, charges, privacy, client_nodes
        self._in_flight = in_flight
        self._config_text = json.dumps(to_dict(config))
        self._cohort_size = config.engine.cohort_size
        self._unit = session.config.privacy.unit
        self._participants: dict[int, list[int]] = {}
        self._spares: dict[int, list[int]] = {}

    # ---- participants

    def participants(self, server_round: int) -> list[int]:
        """Returns the clients of a round, in ascending order; a function of seed and round.

        With client-level privacy without secure aggregation, each client is drawn by its own coin, from the noise key instead of the
        seed; with example-level privacy a client stops before its budget is exceeded. Raises UserError if every client's budget is spent.
        """
        if server_round not in self._participants:
            coins, clients = central_privacy(self._session.config), drawn(self._session.config, server_round, self._session.noise_key)
            asked = [0] if coins else clients  # with coins all clients are charged, drawn or not, and have spent the same
            left = self._within_budget(server_round, asked)
            if asked and not left and self._privacy is not None:
                raise UserError(
                    f"privacy.epsilon: round {server_round} would exceed the budget of {self._privacy.budget:g} of every client that is "
                    "charged; allow more epsilon, more noise or fewer rounds. The rounds before it are in the last checkpoint."
                )
            self._participants[server_round] = clients if coins else left
        return self._participants[server_round]

    def spares(self, server_round: int) -> list[int]:
        """Returns the extra clients to ask, by `federation.over_selection`; a function of seed and round."""
        if server_round not in self._spares:
            self._spares[server_round] = self._within_budget(server_round, spares(self._session.config, server_round))
        return self._spares[server_round]

    def _within_budget(self, server_round: int, clients: list[int]) -> list[int]:
        return self.affordable(clients, self._costs(server_round, clients))

    def affordable(self, clients: Iterable[int], costs: Mapping[int, Mechanism]) -> list[int]:
        """Returns the clients whose cost stays within their budget; a client missing from `costs` pays nothing."""
        if (ledger := self._privacy) is None:
            return list(clients)
        return [each for each in clients if each not in costs or not ledger.would_exceed(each, costs[each], self._delta(each))]

    def charge(self, costs: Mapping[int, Mechanism]) -> None:
        """Charges each client its cost in the privacy ledger."""
        for client, mechanism in costs.items():
            self._privacy.charge(client, mechanism, self._delta(client))  # type: ignore[union-attr]

    def _delta(self, client: int) -> float:
        """Returns the delta for the client's present data."""
        return self._session.privacy_plan[client].delta

    def _costs(self, server_round: int, clients: Iterable[int]) -> dict[int, Mechanism]:
        """Returns each client's cost of a round, without clients that already paid for this same request."""
        if self._privacy is None:
            return {}
        return self.not_in_flight(
            TRAINING, server_round, {client: self._session.privacy_plan[client].round_mechanism for client in clients}
        )

    def not_in_flight(self, what: str, server_round: int, costs: dict[int, Mechanism]) -> dict[int, Mechanism]:
        """Returns the costs without requests already charged before the run was resumed, see `InFlight`."""
        if self._session.config.privacy.secure_aggregation or not self._in_flight.concerns(what, server_round):
            return costs
        digest = self._state.adapter_digest()
        return {client: cost for client, cost in costs.items() if not self._in_flight.covers(what, server_round, digest, client, cost)}

    def charge_privacy(self, server_round: int) -> None:
        """Charges the round before anything leaves a client; with coins every client is charged, drawn or not.

        A client that is asked the same again within a round sends its stored answer, which costs nothing more.
        """
        self.charge(self.charged(server_round))

    def charged(self, server_round: int) -> dict[int, Mechanism]:
        """Returns the privacy cost of a round for each client that it charges; empty if no privacy is claimed."""
        if self._privacy is None:
            return {}
        everybody = range(self._session.config.federation.clients)
        clients = everybody if central_privacy(self._session.config) else [*self.participants(server_round), *self.spares(server_round)]
        return self._costs(server_round, clients)

    # ---- clients and nodes

    def cohorts(self, clients: Sequence[int], grid: Grid) -> Iterator[tuple[int, list[int]]]:
        """Yields (node, clients): cohorts of `engine.cohort_size`, or equal shares for all nodes, dealt to the nodes in turn.

        Clients that keep state between rounds always go to the same node. In a deployment each client goes to its own node.
        """
        if self.client_nodes is not None:
            yield from ((node, [client]) for client, node in self.client_nodes(clients).items())
            return
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            return
        if keeps_memory(self._session.config, self._session.method):
            for place, node in enumerate(nodes):
                mine = [client for client in clients if client % len(nodes) == place]
                size = self._cohort_size or max(1, len(mine))
                yield from ((node, mine[start : start + size]) for start in range(0, len(mine), size))
            return
        size = self._cohort_size or max(1, ceil(len(clients) / len(nodes)))  # a round drawn by coins may be empty
        for node, start in zip(cycle(nodes), range(0, len(clients), size), strict=False):
            yield node, list(clients[start : start + size])

    def nodes(self, clients: Sequence[int], grid: Grid) -> dict[int, int]:
        """Returns the node of each client when every client is asked alone."""
        if self.client_nodes is not None:
            return self.client_nodes(clients)
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            return {}
        return {client: nodes[client % len(nodes)] for client in clients}

    # ---- messages

    def to_train(self, server_round: int, packer: Packer, grid: Grid, clients: Sequence[int]) -> Iterator[Ask]:
        """Yields one request per cohort of these clients, each made lazily."""
        for node, cohort in self.cohorts(clients, grid):
            content = self.state_request(server_round, cohort, packer, **self.private_facts(cohort))
            yield Ask(Message(content, node, TRAIN, group_id=str(server_round)), tuple(cohort))

    def private_facts(self, clients: Sequence[int]) -> dict[str, Any]:
        """Returns the privacy fields of a request."""
        if self._unit is PrivacyUnit.example:
            return {"noise": [self._session.privacy_plan[client].noise_multiplier for client in clients]}
        if self._unit is not PrivacyUnit.client:
            return {}
        fields = {"clip_norm": clip_norm(self._session, self._state)}
        if self._session.config.privacy.secure_aggregation:
            fields["noise_multiplier"] = self._session.privacy_plan[0].noise_multiplier
        return fields

    def state_request(
        self, server_round: int, clients: Sequence[int], packer: Packer, needed: Collection[str] | None = None, **facts: Any
    ) -> RecordDict:
        """Returns a request with the needed parts (None is all) that any of the clients lacks, and charges each for those it lacks."""
        exchange = self._state.exchange
        needed = exchange.versions if needed is None else needed
        lacking = {client: [part for part in exchange.lacking(client) if part in needed] for client in clients}
        behind = [client for client in clients if WEIGHTS in lacking[client]]
        increment = bool(behind) and all(exchange.takes_increment(client) for client in behind)
        for client in clients:
            self._charges.down(server_round, client, lacking[client])
        parts = {part for each in lacking.values() for part in each}
        records, fields = packer.pack(parts, needed, increment=increment)
        return RecordDict({**records, REQUEST: self.request(clients, server_round, fields, **facts)})

    def request(self, clients: Sequence[int], server_round: int, fields: dict[str, str | list[str]], **facts: Any) -> ConfigRecord:
        """Returns the record of a message that holds everything except its arrays."""
        if keeps_memory(self._session.config, self._session.method):
            facts["accepted"] = [self._state.accepted.get(client, 0) for client in clients]
        return ConfigRecord({"config": self._config_text, "clients": list(clients), "round": server_round, **fields, **facts})

    def confirmed(self, ask: Ask) -> None:
        """Notes that the clients of an answered request hold the parts of the global state whose digests it named."""
        parts = json.loads(str(ask.message.content.config_records[REQUEST].get("digests", "{}")))
        for client in ask.clients:
            self._state.exchange.sent(client, parts)

    def again(self, ask: Ask, packer: Packer) -> Ask:
        """Returns the request with the whole global state, for a worker process that lacks a part of it.

        A client with its own worker is charged for what it is sent again. A worker that stands for several clients is part of the
        simulation: what its process lacks is not a cost of the method.
        """
        versions, metadata = self._state.exchange.versions, ask.message.metadata
        if self.client_nodes is not None and metadata.message_type != EVALUATE:
            self._charge_again(ask, int(metadata.group_id))
        records, fields = packer.pack(versions, versions, increment=False)
        asked = {name: value for name, value in ask.message.content.config_records[REQUEST].items() if name not in (ADAPTER, BASES, FOLD)}
        content = RecordDict({**ask.message.content, **records, REQUEST: ConfigRecord({**asked, **fields})})
        return replace(ask, message=Message(content, metadata.dst_node_id, metadata.message_type, group_id=metadata.group_id))

    def _charge_again(self, ask: Ask, server_round: int) -> None:
        self._charges.down_again(server_round, ask.clients)
        sent = ask.message.content.array_records
        for client in ask.clients:
            if secure_key(client) in sent:
                self._charges.protocol(server_round, client, Direction.downlink, sent[secure_key(client)])


def clip_norm(session: Session, state: GlobalState) -> float:
    """Returns the current clip norm of client-level privacy, adapted or as configured."""
    return state.clip_norm or session.config.privacy.clip_norm


def keeps_memory(config: Config, method: Method) -> bool:
    """Whether clients keep local state between rounds."""
    return bool(method.personal) or config.training.scaffold or config.compression.error_feedback

"""The strategy: who takes part, what each worker is asked, how replies become the next global factors, and what it all weighs in bytes.

Messages are addressed to workers (Flower nodes) and name the clients that a worker stands for. Which clients take part is drawn from
the run's seed and the round, never from node ids.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from math import ceil, exp, nan
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.config import Config, Init, PrivacyUnit, ServerConfig, ServerRule, Weighting, to_dict
from fedsim.core import robust
from fedsim.core.collecting import Collector, Rule, keeps_clients
from fedsim.core.communication import CommunicationLedger, Direction, Purpose, Transfer
from fedsim.core.compression import CODECS
from fedsim.core.diagnosis import diagnose
from fedsim.core.exchange import CONTROL, WEIGHTS
from fedsim.core.global_state import GlobalState, folded_layout
from fedsim.core.methods import Method
from fedsim.core.participation import drawn, givers
from fedsim.core.server_optimizers import SERVER_OPTIMIZERS, ServerOptions
from fedsim.core.traffic import down_sizes
from fedsim.errors import UserError
from fedsim.flower.records import (
    arrays_from_record,
    from_record,
    numbers,
    payload_bytes,
    serialized_bytes,
    size_of_floats,
    whole_numbers,
)
from fedsim.flower.transfer import Packer
from fedsim.flower.worker import NEEDS_STATE, client_key, control_key
from fedsim.privacy.accounting import split_noise
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.seeding import torch_generator
from fedsim.session import Session
from fedsim.types import Adapter

REQUEST = "request"
Homes = Callable[[Sequence[int]], dict[int, int]]
"""Gives the node of each of these clients in a deployment, where a client has its own; those that are not connected are left out."""

RULES = {
    ServerRule.median: lambda options: lambda updates, weights: robust.median(updates),
    ServerRule.trimmed_mean: lambda options: lambda updates, weights: robust.trimmed_mean(updates, options.trimmed),
    ServerRule.krum: lambda options: (
        lambda updates, weights: robust.krum(updates, options.malicious, options.kept or len(updates) - options.malicious)
    ),
}


@dataclass
class RoundFacts:
    """What a round's replies say; lists run in the order of arrival."""

    clients: list[int] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # as used in the average, before normalisation
    num_tokens: int = 0
    num_within: int = 0  # clients whose update was within the clip norm
    diagnosis: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> list[float]:
        """The clients' weights p_i, which sum to one."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def mean_loss(self) -> float:
        """Training loss averaged over the clients by their number of examples."""
        if not self.clients:
            return nan
        return sum(n * loss for n, loss in zip(self.num_examples, self.loss, strict=True)) / sum(self.num_examples)


class FedsimStrategy(Strategy):
    """Federated training of one `GlobalState` by any method of `fedsim.core.methods`; every transfer goes into the ledger."""

    def __init__(
        self,
        session: Session,
        config: Config,
        ledger: CommunicationLedger,
        state: GlobalState,
        privacy: PrivacyLedger | None = None,
        homes: Homes | None = None,
    ) -> None:
        self._session, self._method, self._spec = session, session.method, session.spec
        self._federation = session.config.federation
        self._config_text = json.dumps(to_dict(config))
        self._cohort_size = config.engine.cohort_size
        self._ledger, self._privacy, self._homes = ledger, privacy, homes
        self._unit = session.config.privacy.unit
        self._participants: dict[int, list[int]] = {}
        self._state = state
        self._size = cache(self._spec.num_parameters)
        self._control_change = torch.zeros(0)
        self.facts = RoundFacts()

    def participants(self, server_round: int) -> list[int]:
        """Returns the clients of a round, in ascending order; a function of seed and round.

        With client-level privacy each is drawn by its own coin; with example-level privacy a client stops before its budget is exceeded.
        Raises UserError where every client's budget is spent.
        """
        if server_round not in self._participants:
            self._participants[server_round] = self._within_budget(server_round, drawn(self._session.config, server_round))
        return self._participants[server_round]

    def _within_budget(self, server_round: int, clients: list[int]) -> list[int]:
        if self._privacy is None:
            return clients
        plan, ledger = self._session.privacy_plan, self._privacy
        if self._unit is PrivacyUnit.client:
            left = clients if not ledger.would_exceed(0, plan[0].round_mechanism) else None
        else:
            left = [client for client in clients if not ledger.would_exceed(client, plan[client].round_mechanism)] or None
        if left is None:
            raise UserError(
                f"privacy.epsilon: round {server_round} would exceed the budget of {ledger.budget:g} of every client that was drawn; "
                "allow more epsilon, more noise or fewer rounds. The rounds before it are in the last checkpoint."
            )
        return left

    def _charge_privacy(self, clients: Sequence[int]) -> None:
        """Writes the round down before anything of it leaves a client."""
        if self._privacy is not None:
            for client in clients:
                self._privacy.charge(client, self._session.privacy_plan[client].round_mechanism)

    # ---- a round

    def exchange(self, server_round: int, grid: Grid) -> None:
        """Carries one round out and brings the global state forward."""
        packer = Packer(self._state, self._method.moving)
        participants = self.participants(server_round)
        self._charge_privacy(range(self._federation.clients) if self._unit is PrivacyUnit.client else participants)
        messages = self._messages(server_round, packer, grid)
        self._combine(server_round, self._replies(grid, messages, packer, "train"))

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterator[Message]:
        """Yields one message per cohort, made when it is asked for. The state is the strategy's own, so `arrays` is not looked at."""
        return self._messages(server_round, Packer(self._state, self._method.moving), grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combines the clients' uploads as they come into the global state; holds one reply at a time."""
        self._combine(server_round, replies)
        return None, MetricRecord({"loss": self.facts.mean_loss, "num_tokens": self.facts.num_tokens})

    def _messages(self, server_round: int, packer: Packer, grid: Grid) -> Iterator[Message]:
        for node, clients in self.cohorts(self.participants(server_round), grid):
            content = self._brought_up(server_round, clients, packer, **self._private_facts(clients))
            yield Message(content, node, "train", group_id=str(server_round))

    def _private_facts(self, clients: Sequence[int]) -> dict[str, Any]:
        """Returns what a request says of privacy."""
        if self._unit is PrivacyUnit.example:
            return {"noise": [self._session.privacy_plan[client].noise_multiplier for client in clients]}
        return {"clip_norm": self._clip_norm} if self._unit is PrivacyUnit.client else {}

    @property
    def _clip_norm(self) -> float:
        return self._state.clip_norm or self._session.config.privacy.clip_norm

    def _brought_up(
        self, server_round: int, clients: Sequence[int], packer: Packer, needed: Collection[str] | None = None, **facts: Any
    ) -> RecordDict:
        """Returns a request with what any of the clients lacks of the needed parts (None is all), and charges each for what it lacks."""
        exchange = self._state.exchange
        needed = exchange.versions if needed is None else needed
        lacking = {client: [part for part in exchange.lacking(client) if part in needed] for client in clients}
        behind = [client for client in clients if WEIGHTS in lacking[client]]
        increment = bool(behind) and all(exchange.takes_increment(client) for client in behind)
        for client in clients:
            self._charge_down(server_round, client, lacking[client])
            exchange.sent(client, needed)
        parts = {part for each in lacking.values() for part in each}
        records, told = packer.pack(parts, needed, increment=increment)
        return RecordDict({**records, REQUEST: self._request(clients, server_round, told, **facts)})

    def _request(self, clients: Sequence[int], server_round: int, told: dict[str, str | list[str]], **facts: Any) -> ConfigRecord:
        return ConfigRecord({"config": self._config_text, "clients": list(clients), "round": server_round, **told, **facts})

    def _replies(self, grid: Grid, messages: Iterable[Message], packer: Packer, kind: str) -> Iterator[Message]:
        """Yields replies as they come. A worker process that lacks something of the state is sent its request again with all of it."""
        again = []
        for reply in _checked(grid.send_and_receive(messages)):
            if NEEDS_STATE not in reply.content:
                yield reply
                continue
            records, told = packer.pack(self._state.exchange.versions, self._state.exchange.versions, increment=False)
            asked = {
                name: value for name, value in reply.content.config_records[REQUEST].items() if name not in ("adapter", "bases", "fold")
            }
            content = RecordDict({**records, REQUEST: ConfigRecord({**asked, **told})})
            again.append(Message(content, reply.metadata.src_node_id, kind, group_id=reply.metadata.group_id))
        if again:
            yield from _checked(grid.send_and_receive(again))

    def _combine(self, server_round: int, replies: Iterable[Message]) -> None:
        self.facts = RoundFacts()
        state, method, config = self._state, self._method, self._session.config
        kinds = method.uploaded(server_round)
        options, collector = config.method, self._collector(kinds)
        self._control_change = torch.zeros_like(state.control) if state.control is not None else torch.zeros(0)
        for weight, flat, positions in self._updates(server_round, replies):
            collector.add(weight, flat, positions)
        start = self._spec.pack(state.factors, kinds)
        mean = collector.mean() if self.facts.clients else start
        if self._unit is PrivacyUnit.client:
            mean = self._noised(server_round, start, mean)
        new, state.moments = SERVER_OPTIMIZERS[config.server.optimizer].step(start, mean, state.moments, _server_options(config.server))
        collected = collector.collected(new, config.seed, server_round)
        outcome = method.finish(collected)
        state.replace(outcome.factors, method.changed(server_round), server_round)
        if outcome.fold:
            state.fold(outcome.fold, server_round)
        if state.control is not None:
            state.control = state.control + self._control_change
            state.exchange.changed([CONTROL], server_round)
        if config.evaluation.diagnosis:
            self.facts.diagnosis = diagnose(method, options, collector, collected, state)

    def _noised(self, server_round: int, start: Tensor, mean: Tensor) -> Tensor:
        """Client-level privacy: the sum of clipped updates with noise, over the number of clients that are drawn on average.

        With `privacy.adaptive_clip` the clip norm follows the quantile of the updates' norms, by a noised count (arXiv 1905.03871).
        """
        options, expected = self._session.config.privacy, self._federation.fraction * self._federation.clients
        generator = torch_generator(self._session.config.seed, "server noise", server_round)
        noise, clip_norm = self._session.privacy_plan[0].noise_multiplier, self._clip_norm
        if options.adaptive_clip:
            count_noise = max(expected / 20, noise)
            noise = split_noise(noise, count_noise)
            count = self.facts.num_within - len(self.facts.clients) / 2 + count_noise * float(torch.randn((), generator=generator))
            self._state.clip_norm = clip_norm * exp(-options.clip_rate * (count / expected + 0.5 - options.clip_quantile))
        total = (mean - start) * len(self.facts.clients)
        return start + (total + noise * clip_norm * torch.randn(total.shape, generator=generator)) / expected

    def _collector(self, kinds: Sequence[str]) -> Collector:
        config, method = self._session.config, self._method
        wanted = method.products or (config.evaluation.diagnosis and not method.exact)
        rule: Rule | None = RULES[config.server.rule](config.server) if config.server.rule in RULES else None
        keep_clients = keeps_clients(config.method, method.folds)
        return Collector(
            self._spec,
            kinds,
            self._state.factors,
            config.method,
            keep_products=wanted and not keep_clients,
            keep_clients=keep_clients,
            rule=rule,
        )

    def _updates(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[float, Tensor, Tensor | None]]:
        kinds = self._method.uploaded(server_round)
        start = self._spec.pack(self._state.factors, kinds)
        for reply in replies:
            metrics, records = reply.content.metric_records["metrics"], reply.content.array_records  # made anew by Flower at each look
            self.facts.num_tokens += sum(whole_numbers(metrics, "num_tokens"))
            self.facts.num_within += sum(whole_numbers(metrics, "within"))
            clients, counts = whole_numbers(metrics, "clients"), whole_numbers(metrics, "num_examples")
            for client, num_examples, loss in zip(clients, counts, numbers(metrics, "loss"), strict=True):
                self.facts.clients.append(client)
                self.facts.num_examples.append(num_examples)
                self.facts.loss.append(loss)
                weight = float(num_examples) if self._federation.weighting is Weighting.examples else 1.0
                self.facts.weights.append(weight)
                positions = self._session.sent_positions(server_round, client)
                record = records[client_key(client)]
                yield weight, self._read(server_round, client, record, start if positions is None else start[positions]), positions
                if self._state.control is not None:
                    self._add_control(server_round, client, records[control_key(client)])

    def _read(self, server_round: int, client: int, record: ArrayRecord, start: Tensor) -> Tensor:
        """Returns a client's flat upload, decompressed, and charges it."""
        self._charge(server_round, client, Direction.uplink, Purpose.adapter, len(start), record)
        options = self._session.config.compression
        if options.name == "none":
            return from_record(record, len(start))
        codec = CODECS[options.name]
        arrays = arrays_from_record(record, codec.shapes(len(start), options.density))
        return start + codec.decode(arrays, len(start), options.density)

    def _add_control(self, server_round: int, client: int, record: ArrayRecord) -> None:
        """SCAFFOLD: c changes by the participants' mean change times the part of all clients that they are, which is sum / clients."""
        self._charge(server_round, client, Direction.uplink, Purpose.control, len(self._control_change), record)
        self._control_change += from_record(record, len(self._control_change)) / self._federation.clients

    # ---- setting up

    def initial_gradients(self, grid: Grid, server_round: int = 0) -> Adapter:
        """Returns the sum of the clients' weight gradients over `adapter.init_samples` examples in all; streaming, one client at a time."""
        layout = self._session.gradient_layout
        total = torch.zeros(layout.num_parameters, dtype=torch.float64)
        packer = Packer(self._state, self._method.moving)
        mechanisms = {client: each.initialization for client, each in enumerate(self._session.privacy_plan) if each.initialization}
        private = self._session.config.adapter.init is Init.gradient_dp
        givers_ = givers(self._session.config)
        for client, node in self._nodes(list(givers_), grid).items():
            facts: dict[str, Any] = {"noise": [mechanisms[client].noise_multiplier]} if private else {}
            if self._privacy is not None and client in mechanisms:
                self._privacy.charge(client, replace(mechanisms[client], steps=1))
            content = self._brought_up(server_round, [client], packer, (WEIGHTS,), samples=[givers_[client]], **facts)
            message = Message(content, node, "train.initial_gradient", group_id=str(server_round))
            (reply,) = self._replies(grid, [message], packer, "train.initial_gradient")
            record = reply.content.array_records[client_key(client)]
            total += from_record(record, layout.num_parameters)
            self._charge(server_round, client, Direction.uplink, Purpose.initial_gradient, layout.num_parameters, record)
        return layout.unpack(total.float())

    # ---- who does what

    def cohorts(self, clients: Sequence[int], grid: Grid) -> Iterator[tuple[int, list[int]]]:
        """Yields (node, clients): cohorts of `engine.cohort_size`, or equal parts for all nodes, dealt to the nodes in turn.

        Clients that keep something for themselves from round to round always go to the same node. In a deployment each goes to its own.
        """
        if self._homes is not None:
            yield from ((node, [client]) for client, node in self._homes(clients).items())
            return
        nodes = sorted(grid.get_node_ids())
        if keeps_memory(self._session.config, self._method):
            for place, node in enumerate(nodes):
                mine = [client for client in clients if client % len(nodes) == place]
                size = self._cohort_size or max(1, len(mine))
                yield from ((node, mine[start : start + size]) for start in range(0, len(mine), size))
            return
        size = self._cohort_size or ceil(len(clients) / len(nodes))
        for node, start in zip(cycle(nodes), range(0, len(clients), size), strict=False):
            yield node, list(clients[start : start + size])

    def _nodes(self, clients: Sequence[int], grid: Grid) -> dict[int, int]:
        """Returns the node to which each client goes when it is asked alone."""
        if self._homes is not None:
            return self._homes(clients)
        nodes = sorted(grid.get_node_ids())
        return {client: nodes[client % len(nodes)] for client in clients}

    # ---- personal models

    def personal_evaluation(self, server_round: int, grid: Grid) -> dict[str, dict[str, Any]]:
        """Returns {task: {accuracy, loss, num_examples}} over the clients' own models; the test questions are dealt out among them.

        Not charged: it belongs to the experiment, not to what is simulated.
        """
        packer = Packer(self._state, self._method.moving)
        records, told = packer.pack(self._state.exchange.versions, self._state.exchange.versions, increment=False)
        messages = [
            Message(
                RecordDict({**records, REQUEST: self._request(clients, server_round, told)}), node, "evaluate", group_id=str(server_round)
            )
            for node, clients in self.cohorts(range(self._federation.clients), grid)
        ]
        sums: dict[str, list[float]] = {task: [0.0, 0.0, 0.0] for task in self._session.data.test}
        for reply in _checked(grid.send_and_receive(messages)):
            metrics = reply.content.metric_records["metrics"]
            for task, total in sums.items():
                for place, name in enumerate(("correct", "loss", "num_examples")):
                    total[place] += sum(numbers(metrics, f"{task}/{name}"))
        return {task: {"accuracy": right / n, "loss": loss / n, "num_examples": int(n)} for task, (right, loss, n) in sums.items()}

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Evaluation is no part of a round: the server does it on held-out data, or asks for it by `personal_evaluation`."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing is evaluated within a round."""
        return None

    def summary(self) -> None:
        """The run's own display and log tell what Flower would print here."""

    # ---- the ledger

    def _charge_down(self, server_round: int, client: int, parts: Sequence[str]) -> None:
        rank, whole = self._session.client_rank(client), folded_layout(self._spec).num_parameters
        increment = sum(tensor.numel() for tensor in self._state.increment.values())
        exchange = self._state.exchange
        control = len(self._state.control) if self._state.control is not None else 0
        sizes = lambda kinds: control if kinds == (CONTROL,) else self._size(kinds, rank)  # noqa: E731
        for purpose, size in down_sizes(exchange, self._method.moving, client, parts, sizes, whole, increment):
            self._add(server_round, client, Direction.downlink, purpose, size, 4 * size, size_of_floats(size))

    def _charge(self, server_round: int, client: int, direction: Direction, purpose: Purpose, parameters: int, record: ArrayRecord) -> None:
        self._add(server_round, client, direction, purpose, parameters, payload_bytes(record), serialized_bytes(record))

    def _add(
        self, server_round: int, client: int, direction: Direction, purpose: Purpose, parameters: int, payload: int, size: int
    ) -> None:
        if not self._method.pooled:
            self._ledger.add(Transfer(server_round, client, direction, purpose, parameters, 4 * parameters, payload, size))


def keeps_memory(config: Config, method: Method) -> bool:
    """Whether clients keep something for themselves from round to round."""
    return bool(method.personal) or config.training.scaffold or config.compression.error_feedback


def _server_options(server: ServerConfig) -> ServerOptions:
    return ServerOptions(server.learning_rate, server.momentum, server.beta2, server.tau)


def _checked(replies: Iterable[Message]) -> Iterator[Message]:
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"Worker {reply.metadata.src_node_id} failed: {reply.error.reason}")
        yield reply

"""Predicts what a run sends from shapes alone, without weights, data or training.

It goes through all rounds with the `Exchange`, the random draws and the sizes of a real run, so parameters and payload bytes equal those of
the run's ledger, transfer by transfer. It includes the drop-outs of `federation.dropout`, not those of a simulated network. With
`federation.over_selection` it counts the bytes of all selected clients, as in a run that asks them in one message; with smaller cohorts, a
run stops asking once enough have replied.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import lcm
from typing import NamedTuple

from fedsim.choices import Init, Mode
from fedsim.config import Config
from fedsim.core.collecting import keeps_clients
from fedsim.core.communication import SETUP, Direction, Purpose
from fedsim.core.compression import CODECS
from fedsim.core.dropout import Stage, attendance, enough_responding, responding
from fedsim.core.exchange import CONTROL
from fedsim.core.forms import AdapterSpec
from fedsim.core.gradient_parts import parts_of
from fedsim.core.initialization import DERIVED
from fedsim.core.methods import Method
from fedsim.core.participation import central_privacy, drawn, gradient_samples, round_size, spares
from fedsim.core.quantization import gradient_quantizer, num_counters, upload_quantizer
from fedsim.core.ranks import deal_ranks
from fedsim.core.secure_aggregation import neighbour_graph
from fedsim.core.secure_traffic import protocol_traffic
from fedsim.core.traffic import down_sizes, needed_for_gradients, refresh_due, starting_exchange
from fedsim.errors import UserError


class Charge(NamedTuple):
    """One transfer as in the ledger, without the bytes of Flower's own serialisation."""

    round: int
    client: int
    direction: Direction
    purpose: Purpose
    parameters: int
    payload_bytes: int


class Amount(NamedTuple):
    """The amount sent, as a mean over clients or rounds if they differ."""

    parameters: float
    payload_bytes: float


@dataclass(frozen=True)
class Forecast:
    """The cost of a run.

    The first fields are for one client that takes part in every round; if clients differ in rank, they are means over clients. `up` and
    `down` are for a middle round, without set-up and the peculiarities of the first round; if rounds differ, they are means over rounds.
    """

    trained: float  # parameters in a round
    up: Amount
    down: Amount
    bases: float  # parameters over all rounds
    gradient: int  # parameters of the initial gradients of one client that gives any, over all rounds
    clients_with_gradient: int  # clients that send initial gradients
    totals: dict[str, int]  # {uplink,downlink,setup}_{parameters,payload_bytes} over all clients and rounds, as in the ledger


def charges(config: Config, method: Method, spec: AdapterSpec) -> Iterator[Charge]:
    """Yields every transfer of the run of `config`, in which the method's defaults must be resolved.

    Raises UserError for federation.mode=fedbuff, and for an upload that is too large to be compressed.
    """
    return (charge for charge in _DryRun(config, method, spec).charges() if charge.client < config.federation.clients)


def forecast(config: Config, method: Method, spec: AdapterSpec) -> Forecast:
    """Returns the cost of the run of `config`. Raises as `charges` does."""
    clients = config.federation.clients
    totals = {f"{kind}_{what}": 0 for kind in ("uplink", "downlink", "setup") for what in Amount._fields}
    ranks = _ranks(config, spec)
    share = {clients + place: ranks.count(rank) / clients for place, rank in enumerate(sorted(set(ranks)))}
    bases, gradients = 0.0, dict.fromkeys(range(clients), 0)
    for charge in _DryRun(config, method, spec, observers=sorted(set(ranks))).charges():
        if charge.client >= clients:
            bases += share[charge.client] * charge.parameters if charge.purpose is Purpose.bases else 0
            continue
        kind = "setup" if charge.purpose in SETUP else charge.direction.name
        totals[f"{kind}_parameters"] += charge.parameters
        totals[f"{kind}_payload_bytes"] += charge.payload_bytes
        gradients[charge.client] += charge.parameters if charge.purpose is Purpose.initial_gradient else 0
    given = [count for count in gradients.values() if count]
    trained, up, down = _mean_round(config, method, spec, share)
    return Forecast(trained, up, down, bases, max(given, default=0), len(given), totals)


def _mean_round(config: Config, method: Method, spec: AdapterSpec, share: dict[int, float]) -> tuple[float, Amount, Amount]:
    """Returns what observers train, send and receive per round: means over ranks by `share`, and over a full period from round 2 on."""
    last = 1 + max(2, lcm(config.adapter.refresh_every or 1, len(method.turns)))
    longer = replace(config, federation=replace(config.federation, rounds=last + 1))
    dry_run = _DryRun(longer, method, spec, observers=sorted(set(_ranks(config, spec))))
    rounds = range(2, last + 1)
    trained = sum(share[client] * dry_run.held(method.trained(number), client) for client in share for number in rounds)
    sums = {direction: [0.0, 0.0] for direction in Direction}
    for charge in dry_run.charges():
        if charge.client in share and charge.round in rounds and charge.purpose not in SETUP:
            for place, amount in enumerate((charge.parameters, charge.payload_bytes)):
                sums[charge.direction][place] += share[charge.client] * amount / len(rounds)
    return trained / len(rounds), Amount(*sums[Direction.uplink]), Amount(*sums[Direction.downlink])


def _ranks(config: Config, spec: AdapterSpec) -> list[int]:
    """Returns the rank of each client."""
    federation = config.federation
    return deal_ranks(federation.clients, federation.ranks, config.seed) if federation.ranks else [spec.rank] * federation.clients


class _DryRun:
    """A run's messages, round by round. Observers, one per given rank, are numbered after the clients: they take part in every round,
    give no gradients, and their uploads are not used."""

    def __init__(self, config: Config, method: Method, spec: AdapterSpec, observers: Sequence[int] = ()) -> None:
        if config.federation.mode is Mode.fedbuff:
            raise UserError(
                "federation.mode=fedbuff: the choice of clients depends on simulated times, which only a run has; use sync for its cost."
            )
        self._config, self._method, self._spec = config, method, spec
        self._exchange = starting_exchange(method, config.adapter.init, scaffold=config.training.scaffold)
        self._clients = config.federation.clients
        self._rank = [*_ranks(config, spec), *observers]
        self._size = cache(spec.num_parameters)
        self._dense_size = sum(rows * columns for rows, columns in spec.layers.values())
        self._gradient_size = parts_of(config, spec).layout.num_parameters
        self._increment = 0
        self._secure = config.privacy.secure_aggregation

    def charges(self) -> Iterator[Charge]:
        """Yields every transfer in the order of rounds."""
        if self._method.pooled:
            return
        yield from self._gradients(0)
        for number in range(1, self._config.federation.rounds + 1):
            wanted = drawn(self._config, number)
            asked = [*wanted, *spares(self._config, number)]
            receiving, sending, summed = yield from self._stages(number, asked, number)
            observers = range(self._clients, len(self._rank))
            for client in (*receiving, *observers):
                yield from self._down(number, client, self._exchange.versions)
            for client in (*sending, *observers):
                yield from self._up(number, client)
            self._combine(number, summed[: len(wanted)])
            if refresh_due(self._config, number):
                yield from self._refresh(number)

    def held(self, kinds: Sequence[str], client: int) -> int:
        """Returns the number of parameters of these kinds that a client trains in a round."""
        heads = self._config.method.client_heads
        return self._size(kinds, self._rank[client]) if heads is None else replace(self._spec, heads=heads).num_parameters(kinds)

    def _gradients(self, number: int) -> Iterator[Charge]:
        """Yields the transfers of initial gradients after round `number`; each giver needs the current base weights."""
        if self._config.adapter.init in DERIVED or self._config.adapter.init is Init.gradient_public:
            return
        clients, size = list(gradient_samples(self._config)), 4 * self._gradient_size
        yield from self._stages(number, clients, 0)
        if self._secure:
            quantizer = gradient_quantizer(self._config.secure.gradient_range, len(clients))
            size = quantizer.width * (self._gradient_size + quantizer.digits)
        for client in clients:
            yield from self._down(number, client, needed_for_gradients(self._exchange))
            yield Charge(number, client, Direction.uplink, Purpose.initial_gradient, self._gradient_size, size)

    def _stages(self, number: int, clients: list[int], dropouts: int) -> Generator[Charge, None, tuple[list[int], list[int], list[int]]]:
        """Yields the transfers of secure aggregation itself; returns the clients asked for an upload, sending one, and in the result.

        `dropouts` is the round whose simulated drop-outs apply, 0 for none. Observers count as clients of a round without drop-outs.
        """
        if not self._secure:
            return clients, (sending := responding(self._config, dropouts, clients)), sending
        options, seed = self._config.secure, self._config.seed
        graph = neighbour_graph(clients, options.neighbours, seed, number)
        present = attendance(self._config, dropouts, graph)
        sent = list(protocol_traffic(graph, present))
        if dropouts:
            whole = protocol_traffic(graph, dict.fromkeys(Stage, clients))
            template = [each for each in whole if each.client == clients[0]]
            sent += [each._replace(client=client) for client in range(self._clients, len(self._rank)) for each in template]
        for each in sent:
            yield Charge(number, each.client, each.direction, Purpose.secure_aggregation, 0, each.payload_bytes)
        receiving, sending = present.get(Stage.shares, []) if Stage.upload in present else [], present.get(Stage.upload, [])
        return receiving, sending, sending if enough_responding(self._config, graph, present, Stage.unmasking) else []

    def _down(self, number: int, client: int, needed: Collection[str]) -> Iterator[Charge]:
        lacking = [part for part in self._exchange.lacking(client) if part in needed]

        def sizes(kinds: Sequence[str]) -> int:
            return self._control if kinds == (CONTROL,) else self._size(kinds, self._rank[client])

        for purpose, size in down_sizes(self._exchange, self._method.moving, client, lacking, sizes, self._dense_size, self._increment):
            yield Charge(number, client, Direction.downlink, purpose, size, 4 * size)
        self._exchange.sent(client, needed)

    def _up(self, number: int, client: int) -> Iterator[Charge]:
        size = self.held(self._method.uploaded(number), client)
        yield Charge(number, client, Direction.uplink, Purpose.adapter, size, self._payload(size))
        if self._config.training.scaffold:
            yield Charge(number, client, Direction.uplink, Purpose.control, self._control, 4 * self._control)

    @property
    def _control(self) -> int:
        return self._spec.num_parameters(self._method.uploaded(1))

    def _payload(self, size: int) -> int:
        options = self._config.compression
        if self._secure:
            quantizer = upload_quantizer(self._config, round_size(self._clients, self._config.federation.fraction))
            return quantizer.width * (size + num_counters(self._config) * quantizer.digits)
        if options.name == "none":
            return 4 * size
        try:
            return CODECS[options.name].num_bytes(size, options.density)
        except ValueError as error:
            raise UserError(f"compression.name={options.name}: {error} Send less, or do not compress.") from error

    def _combine(self, number: int, clients: Sequence[int]) -> None:
        """Records what the server changes at the end of a round: nothing if no client replied, unless the server adds noise."""
        if not clients and not central_privacy(self._config):
            return
        self._exchange.changed(self._method.changed(number), number)
        if self._method.folds and clients:
            self._increment = self._fold(clients)
            self._exchange.added(number, () if self._increment else None)
        if self._config.training.scaffold:
            self._exchange.changed((CONTROL,), number)

    def _fold(self, clients: Sequence[int]) -> int:
        """Returns the number of parameters in the factors of what a round adds to the base weights, 0 if that is dense."""
        options = self._config.method
        if options.residual_rank is not None:
            return sum(min(options.residual_rank, *shape) * sum(shape) for shape in self._spec.layers.values())
        if keeps_clients(options, folds=True):
            return sum(self._size(("B", "A"), self._rank[client]) for client in clients)
        return 0

    def _refresh(self, number: int) -> Iterator[Charge]:
        self._increment = self._size(("R",))
        self._exchange.added(number, ("B", "A"))
        yield from self._gradients(number)
        self._exchange.changed(self._spec.form.kinds, number)

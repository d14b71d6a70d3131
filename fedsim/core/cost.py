"""What a run will send, predicted from shapes alone: no weights, no data and no training.

It walks through all rounds with the `Exchange`, the random draws and the sizes that a run itself uses, so parameters and payload bytes are
those of the run's ledger, transfer by transfer. Drop-outs of a simulated network are left out; those of `federation.dropout` are not. With
`federation.over_selection` the bytes of all clients that are asked count, as in a run that asks them in one message; with smaller cohorts,
some are no longer asked once enough have replied.
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
from fedsim.core.dropout import Stage, attendance, enough_heard, heard
from fedsim.core.exchange import CONTROL
from fedsim.core.forms import AdapterSpec
from fedsim.core.gradient_parts import parts_of
from fedsim.core.initialization import DERIVED
from fedsim.core.methods import Method
from fedsim.core.participation import drawn, givers, round_size, server_adds_noise, spares
from fedsim.core.quantization import gradient_quantizer, num_counters, upload_quantizer
from fedsim.core.ranks import deal_ranks
from fedsim.core.secure_aggregation import neighbour_graph
from fedsim.core.secure_traffic import protocol_traffic
from fedsim.core.traffic import down_sizes, needed_for_gradients, refresh_due, starting_exchange
from fedsim.errors import UserError


class Charge(NamedTuple):
    """One transfer as the ledger will hold it, but for the bytes of Flower's own serialisation."""

    round: int
    client: int
    direction: Direction
    purpose: Purpose
    parameters: int
    payload_bytes: int


class Amount(NamedTuple):
    """What travels, as a mean over clients or rounds where they differ."""

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
    gradient: int  # parameters of one client's initial gradients over all rounds, where it gives any
    givers: int  # clients that give initial gradients
    totals: dict[str, int]  # {uplink,downlink,setup}_{parameters,payload_bytes} over all clients and rounds, as in the ledger


def charges(config: Config, method: Method, spec: AdapterSpec) -> Iterator[Charge]:
    """Yields every transfer of the run that `config` describes, in which the method has settled what it decides.

    Raises UserError for an upload that is too large to be compressed.
    """
    return (charge for charge in _Walk(config, method, spec).charges() if charge.client < config.federation.clients)


def forecast(config: Config, method: Method, spec: AdapterSpec) -> Forecast:
    """Returns the cost of the run that `config` describes. Raises as `charges` does."""
    clients = config.federation.clients
    totals = {f"{kind}_{what}": 0 for kind in ("uplink", "downlink", "setup") for what in Amount._fields}
    ranks = _ranks(config, spec)
    share = {clients + place: ranks.count(rank) / clients for place, rank in enumerate(sorted(set(ranks)))}
    bases, gradients = 0.0, dict.fromkeys(range(clients), 0)
    for charge in _Walk(config, method, spec, observers=sorted(set(ranks))).charges():
        if charge.client >= clients:
            bases += share[charge.client] * charge.parameters if charge.purpose is Purpose.bases else 0
            continue
        kind = "setup" if charge.purpose in SETUP else charge.direction.name
        totals[f"{kind}_parameters"] += charge.parameters
        totals[f"{kind}_payload_bytes"] += charge.payload_bytes
        gradients[charge.client] += charge.parameters if charge.purpose is Purpose.initial_gradient else 0
    given = [count for count in gradients.values() if count]
    trained, up, down = _steady(config, method, spec, share)
    return Forecast(trained, up, down, bases, max(given, default=0), len(given), totals)


def _steady(config: Config, method: Method, spec: AdapterSpec, share: dict[int, float]) -> tuple[float, Amount, Amount]:
    """Returns what an observer of each rank trains, sends and receives, as the mean from round 2 on over as many as may differ."""
    last = 1 + max(2, lcm(config.adapter.refresh_every or 1, len(method.turns)))
    longer = replace(config, federation=replace(config.federation, rounds=last + 1))
    walk = _Walk(longer, method, spec, observers=sorted(set(_ranks(config, spec))))
    rounds = range(2, last + 1)
    trained = sum(share[client] * walk.held(method.trained(number), client) for client in share for number in rounds)
    sums = {direction: [0.0, 0.0] for direction in Direction}
    for charge in walk.charges():
        if charge.client in share and charge.round in rounds and charge.purpose not in SETUP:
            for place, amount in enumerate((charge.parameters, charge.payload_bytes)):
                sums[charge.direction][place] += share[charge.client] * amount / len(rounds)
    return trained / len(rounds), Amount(*sums[Direction.uplink]), Amount(*sums[Direction.downlink])


def _ranks(config: Config, spec: AdapterSpec) -> list[int]:
    """Returns the rank of each client."""
    federation = config.federation
    return deal_ranks(federation.clients, federation.ranks, config.seed) if federation.ranks else [spec.rank] * federation.clients


class _Walk:
    """A run's messages, round by round. Observers, one of each given rank, come after the clients: they take part in every round, give
    no gradients, and nothing that they send is used."""

    def __init__(self, config: Config, method: Method, spec: AdapterSpec, observers: Sequence[int] = ()) -> None:
        if config.federation.mode is Mode.fedbuff:
            raise UserError(
                "federation.mode=fedbuff: who is asked depends on simulated times, which only a run has; use sync for its cost."
            )
        self._config, self._method, self._spec = config, method, spec
        self._exchange = starting_exchange(method, config.adapter.init, scaffold=config.training.scaffold)
        self._clients = config.federation.clients
        self._rank = [*_ranks(config, spec), *observers]
        self._size = cache(spec.num_parameters)
        self._whole = sum(rows * columns for rows, columns in spec.layers.values())
        self._of_gradients = parts_of(config, spec).layout.num_parameters
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
            told, sending, summed = yield from self._attending(number, asked, number)
            observers = range(self._clients, len(self._rank))
            for client in (*told, *observers):
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
        """Yields the initial gradients after round `number`, each from a client that has the base weights as they are then."""
        if self._config.adapter.init in DERIVED or self._config.adapter.init is Init.gradient_public:
            return
        clients, size = list(givers(self._config)), 4 * self._of_gradients
        yield from self._attending(number, clients, 0)
        if self._secure:
            quantizer = gradient_quantizer(self._config.secure.gradient_range, len(clients))
            size = quantizer.width * (self._of_gradients + quantizer.digits)
        for client in clients:
            yield from self._down(number, client, needed_for_gradients(self._exchange))
            yield Charge(number, client, Direction.uplink, Purpose.initial_gradient, self._of_gradients, size)

    def _attending(self, number: int, clients: list[int], dropouts: int) -> Generator[Charge, None, tuple[list[int], list[int], list[int]]]:
        """Yields what secure aggregation itself sends, and returns who is asked for an upload, who sends one and who is in the result.

        `dropouts` is the round of which the simulated ones are, 0 for none. Observers are as clients of a round in which all stay.
        """
        if not self._secure:
            return clients, (sending := heard(self._config, dropouts, clients)), sending
        options, seed = self._config.secure, self._config.seed
        graph = neighbour_graph(clients, options.neighbours, seed, number)
        present = attendance(self._config, dropouts, graph)
        sent = list(protocol_traffic(graph, present))
        if dropouts:
            whole = protocol_traffic(graph, dict.fromkeys(Stage, clients))
            alike = [each for each in whole if each.client == clients[0]]
            sent += [each._replace(client=client) for client in range(self._clients, len(self._rank)) for each in alike]
        for each in sent:
            yield Charge(number, each.client, each.direction, Purpose.secure_aggregation, 0, each.payload_bytes)
        told, sending = present.get(Stage.shares, []) if Stage.upload in present else [], present.get(Stage.upload, [])
        return told, sending, sending if enough_heard(self._config, graph, present, Stage.unmasking) else []

    def _down(self, number: int, client: int, needed: Collection[str]) -> Iterator[Charge]:
        lacking = [part for part in self._exchange.lacking(client) if part in needed]

        def sizes(kinds: Sequence[str]) -> int:
            return self._control if kinds == (CONTROL,) else self._size(kinds, self._rank[client])

        for purpose, size in down_sizes(self._exchange, self._method.moving, client, lacking, sizes, self._whole, self._increment):
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
        """Notes what the server changes at the end of a round, which is nothing where nobody was heard, but for noise."""
        if not clients and not server_adds_noise(self._config):
            return
        self._exchange.changed(self._method.changed(number), number)
        if self._method.folds and clients:
            self._increment = self._fold(clients)
            self._exchange.added(number, () if self._increment else None)
        if self._config.training.scaffold:
            self._exchange.changed((CONTROL,), number)

    def _fold(self, clients: Sequence[int]) -> int:
        """Returns the number of parameters of the factors of what a round adds to the base weights, 0 where it is dense."""
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

"""Simulated networks: how long a client takes for a round, from its bandwidth, latency and speed, and which replies a round waits for.

    seconds = latency + 8 bytes down / downlink + tokens / speed + latency + 8 bytes up / uplink

No clock is involved: times are drawn from the seed, so a simulated run gives the same on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from fedsim.seeding import numpy_generator

NO_NETWORK = "none"
"""Value of `federation.network` that simulates nothing."""
MBIT = 1e6
FLOPS_PER_PARAMETER = 6  # of one token, forward and backward


@dataclass(frozen=True)
class Link:
    """One client's connection and speed."""

    uplink: float  # bit/s
    downlink: float  # bit/s
    latency: float  # seconds, one way: half a ping
    dropout: float  # probability that it vanishes in a round
    speed: float  # tokens/s of training

    def seconds(self, bytes_down: float, tokens: float, bytes_up: float) -> float:
        """Returns the time from the server's message to the arrival of the whole reply."""
        return 2 * self.latency + 8 * bytes_down / self.downlink + tokens / self.speed + 8 * bytes_up / self.uplink


@dataclass(frozen=True)
class Population:
    """Medians of one kind of client, and log-normal sigmas of bandwidths (both directions together) and of speed."""

    uplink: float
    downlink: float
    latency: float
    dropout: float
    flops: float  # floating-point operations per second of training
    bandwidth_sigma: float = 0.0
    speed_sigma: float = 0.0


POPULATIONS = {
    "uniform": Population(100 * MBIT, 100 * MBIT, 0.005, 0.0, 1e13),
    "broadband": Population(30 * MBIT, 75 * MBIT, 0.005, 0.0, 1e13, bandwidth_sigma=0.7, speed_sigma=0.5),
    "mobile": Population(9 * MBIT, 34 * MBIT, 0.014, 0.05, 1e11, bandwidth_sigma=1.0, speed_sigma=0.7),
}
"""Latencies are half the global median pings that Ookla reported for November 2022 (fixed 10 ms, mobile 28 ms), bandwidths are of the order
of its medians of that time. Spreads, drop-outs and speeds are assumptions: a desktop GPU and a phone that reach 10 and 0.1 TFLOP/s."""


def draw_links(population: Population, clients: int, num_parameters: int, seed: int) -> list[Link]:
    """Returns the links of the clients, drawn from the seed; `num_parameters` of the model converts FLOP/s to tokens/s."""
    drawn = numpy_generator(seed, "network").standard_normal((clients, 2))
    bandwidth, speed = np.exp(drawn * (population.bandwidth_sigma, population.speed_sigma)).T.tolist()
    tokens = population.flops / (FLOPS_PER_PARAMETER * num_parameters)
    return [
        Link(population.uplink * wide, population.downlink * wide, population.latency, population.dropout, tokens * fast)
        for wide, fast in zip(bandwidth, speed, strict=True)
    ]


@dataclass(frozen=True)
class RoundEnd:
    """When a round ends, in simulated seconds from its start, and the clients that have replied by then, in the order of arrival."""

    seconds: float
    arrived: tuple[int, ...]


def round_end(seconds: Mapping[int, float], wanted: int, least: int, deadline: float | None) -> RoundEnd:
    """Returns the end of a round in which each client replies after `seconds[client]`; clients that vanish are not in `seconds`.

    The round ends as soon as `wanted` replies have arrived; at the deadline, if `least` have; else as soon as `least` or all have.
    Without a deadline it does not wait for clients that vanish.
    """
    order = sorted(seconds, key=lambda client: (seconds[client], client))
    if not order:
        return RoundEnd(deadline or 0.0, ())
    last = seconds[order[min(wanted, len(order)) - 1]]
    if deadline is not None:
        enough = seconds[order[min(max(least, 1), len(order)) - 1]]
        waited = last if len(order) >= wanted else inf  # the server cannot know that no more will come
        last = min(waited, max(deadline, enough))
    return RoundEnd(last, tuple(client for client in order if seconds[client] <= last)[:wanted])


def dropout_rates(links: Sequence[Link], everywhere: float) -> list[float]:
    """Returns each client's probability of vanishing in a round: by its link, or by the independent rate `everywhere` of all clients."""
    return [1 - (1 - link.dropout) * (1 - everywhere) for link in links]

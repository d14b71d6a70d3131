"""Plans the privacy cost and the noise of every client's training in advance, from the configuration and the data sizes alone.

Example-level: client i samples with rate batch / n_i in every local step of the rounds that it takes part in; participants are drawn
from the seed and known to all, so no amplification is claimed for it. Client-level: each round an independent coin draws every client with
probability `federation.fraction`, and the round is charged to all; if the clients add the noise themselves under secure aggregation,
the server sees the participants, and the round is charged to them without amplification.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedsim.choices import Init, PrivacyUnit
from fedsim.config import Config
from fedsim.core.participation import draw_participants, round_size, spares, steps_per_round
from fedsim.core.quantization import limit_of
from fedsim.core.secure_aggregation import fewest_survivors
from fedsim.errors import UserError
from fedsim.privacy.accounting import INITIALIZATION, TRAINING, Mechanism, check_delta, default_delta, noise_multiplier_for
from fedsim.privacy.discrete import gaussian_of_skellam, skellam_of_gaussian
from fedsim.training.private import coin_rate, sampling_rate

ROOM_FOR_NOISE = 10
"""Standard deviations of noise that fit into a sum: one entry in 10^23 exceeds them and wraps around, which costs no privacy."""


@dataclass(frozen=True)
class ClientPlan:
    """One client's training: `rounds` times `steps` steps that sample at `rate`, after an optional initialisation."""

    num_examples: int
    rate: float
    steps: int
    rounds: int
    delta: float
    noise_multiplier: float
    initialization: Mechanism | None
    charged_noise: float | None = None  # of the Gaussian mechanism charged for discrete noise

    @property
    def round_mechanism(self) -> Mechanism:
        """Returns the mechanism of one round."""
        return Mechanism(self.noise_multiplier if self.charged_noise is None else self.charged_noise, self.rate, self.steps, TRAINING)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Returns all mechanisms of the run."""
        training = [replace(self.round_mechanism, steps=self.steps * self.rounds)] if self.rounds else []
        return [*([self.initialization] if self.initialization else []), *training]


def plan(config: Config, sizes: Sequence[int]) -> list[ClientPlan]:
    """Returns the plan of each client from their numbers of examples, `sizes`. Raises UserError if a budget cannot be kept.

    Clients with equal plans share one calibration, which takes seconds.
    """
    if config.privacy.unit is PrivacyUnit.example:
        return _example_level(config, sizes)
    return _distributed(config) if config.privacy.secure_aggregation else [_client_level(config)] * len(sizes)


def _client_level(config: Config) -> ClientPlan:
    """Plans for a client's whole update as the unit: neighbours differ by replacing one client's update with zero.

    An independent secret coin draws every client, the sum is divided by a constant (never by the number of participants), and each round
    is charged to every client, drawn or not.
    """
    federation, privacy = config.federation, config.privacy
    delta = _delta(privacy.delta, federation.clients)
    noise = _noise(config, delta, federation.fraction, federation.rounds, [])
    return ClientPlan(federation.clients, federation.fraction, 1, federation.rounds, delta, noise, None)


def _distributed(config: Config) -> list[ClientPlan]:
    """Plans for noise added by the clients: one deviation for all, calibrated to the client that takes part most often.

    The participants are a set of fixed size: a round costs each a full mechanism and the others nothing. No amplification is claimed:
    it is proven only for replacing a client, at twice the sensitivity, and does not compose like Poisson sampling (arXiv 2405.20769).
    """
    federation, options = config.federation, config.secure
    delta, taken = _delta(config.privacy.delta, federation.clients), _rounds_taken(config)
    limit, size = limit_of(options.bits), round_size(federation.clients, federation.fraction)
    given = config.privacy.noise_multiplier
    noise = skellam_of_gaussian(_noise(config, delta, 1.0, max(taken), []), limit) if given is None else given
    deviation = noise * limit * (size / fewest_survivors(size, options.threshold)) ** 0.5
    if size * limit + ROOM_FOR_NOISE * deviation >= 1 << 31:
        raise UserError(
            f"secure.bits: a sum of {size} clients with noise {noise:.3g} x clip_norm does not fit into 32 bits; use fewer bits than "
            f"{options.bits}."
        )
    charged = gaussian_of_skellam(noise, limit)
    return [ClientPlan(federation.clients, 1.0, 1, rounds, delta, noise, None, charged) for rounds in taken]


def _rounds_taken(config: Config) -> list[int]:
    """Returns the number of rounds that each client takes part in, spares included, if rounds draw a fixed number of clients."""
    federation = config.federation
    taken = [0] * federation.clients
    for number in range(1, federation.rounds + 1):
        drawn = draw_participants(federation.clients, federation.fraction, config.seed, number)
        for client in (*drawn, *spares(config, number)):
            taken[client] += 1
    return taken


def _example_level(config: Config, sizes: Sequence[int]) -> list[ClientPlan]:
    training = config.training
    plans = []
    for size, rounds in zip(sizes, _rounds_taken(config), strict=True):
        delta = _delta(config.privacy.delta, size)
        rate, steps = sampling_rate(size, training.batch_size * training.accumulation), steps_per_round(size, training)
        initialization = _initialization(config, delta, sum(sizes))
        noise = _noise(config, delta, rate, steps * rounds, [initialization] if initialization else [])
        plans.append(ClientPlan(size, rate, steps, rounds, delta, noise, initialization))
    return plans


def init_rate(config: Config, of_all_clients: int) -> float:
    """Returns the probability that an example is in the sample for the initial gradient, given the total number of examples."""
    return coin_rate(config.adapter.init_samples / of_all_clients)


def _initialization(config: Config, delta: float, of_all_clients: int) -> Mechanism | None:
    privacy, init = config.privacy, config.adapter.init
    every = config.adapter.refresh_every
    times = 1 + ((config.federation.rounds - 1) // every if every else 0)
    if init is Init.gradient:  # only with privacy.unsafe_init
        return Mechanism(0.0, 1.0, times, INITIALIZATION)
    if init is not Init.gradient_dp:
        return None
    rate, noise = init_rate(config, of_all_clients), privacy.init_noise_multiplier
    if noise is None:
        if privacy.epsilon is None:
            raise UserError("privacy.init_noise_multiplier: expected a number, or privacy.epsilon to calibrate it to; give one of them.")
        noise = noise_multiplier_for(privacy.init_share * privacy.epsilon, delta, [(rate, times)], (), privacy.accountant.name)
    return Mechanism(noise, rate, times, INITIALIZATION)


def _noise(config: Config, delta: float, rate: float, steps: int, already: list[Mechanism]) -> float:
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.epsilon is None:
        raise UserError("privacy: expected privacy.epsilon or privacy.noise_multiplier, got neither; give one of them.")
    if not steps:
        return 0.0
    spent = [] if budget(config) is None else already
    return noise_multiplier_for(privacy.epsilon, delta, [(rate, steps)], spent, privacy.accountant.name)


def budget(config: Config) -> float | None:
    """Returns the epsilon that no client exceeds, or None if there is none or the initialisation leaks (privacy.unsafe_init)."""
    return None if config.adapter.init is Init.gradient else config.privacy.epsilon


def _delta(given: float | None, units: int) -> float:
    if given is None:
        return default_delta(units)
    check_delta(given, units)
    return given

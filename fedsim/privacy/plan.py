"""What every client's training will cost and how much noise it takes, before anything is computed: a function of configuration and sizes.

Example-level: client i samples with rate batch / n_i in every local step of the rounds that it takes part in; who takes part is drawn
from the seed and known to all, so no amplification is claimed for it. Client-level: each round every client is drawn by its own coin with
probability `federation.fraction`, and the round is charged to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.config import Config, Init, PrivacyUnit
from fedsim.core.participation import draw_participants
from fedsim.errors import UserError
from fedsim.privacy.accounting import Mechanism, check_delta, default_delta, noise_multiplier_for
from fedsim.training.batches import steps_per_round
from fedsim.training.private import sampling_rate

TRAINING, INITIALIZATION = "training", "initialization"


@dataclass(frozen=True)
class ClientPlan:
    """What one client does: `rounds` times `steps` steps that sample at `rate`, after an initialisation where there is one."""

    num_examples: int
    rate: float
    steps: int
    rounds: int
    delta: float
    noise_multiplier: float
    initialization: Mechanism | None

    @property
    def round_mechanism(self) -> Mechanism:
        """What one round costs."""
        return Mechanism(self.noise_multiplier, self.rate, self.steps, TRAINING)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Everything that the run will cost."""
        training = [Mechanism(self.noise_multiplier, self.rate, self.steps * self.rounds, TRAINING)] if self.rounds else []
        return [*([self.initialization] if self.initialization else []), *training]


def plan(config: Config, sizes: Sequence[int]) -> list[ClientPlan]:
    """Returns the plan of each client, `sizes` being their numbers of examples. Raises UserError where a budget cannot be kept.

    Clients whose plans are alike share one calibration, which takes seconds.
    """
    return [_client_level(config)] * len(sizes) if config.privacy.unit is PrivacyUnit.client else _example_level(config, sizes)


def _client_level(config: Config) -> ClientPlan:
    federation, privacy = config.federation, config.privacy
    delta = _delta(privacy.delta, federation.clients)
    noise = _noise(config, delta, federation.fraction, federation.rounds, [])
    return ClientPlan(federation.clients, federation.fraction, 1, federation.rounds, delta, noise, None)


def _example_level(config: Config, sizes: Sequence[int]) -> list[ClientPlan]:
    federation, training = config.federation, config.training
    taken = [0] * len(sizes)
    for number in range(1, federation.rounds + 1):
        for client in draw_participants(len(sizes), federation.fraction, config.seed, number):
            taken[client] += 1
    plans = []
    for size, rounds in zip(sizes, taken, strict=True):
        delta = _delta(config.privacy.delta, size)
        rate, steps = sampling_rate(size, training.batch_size * training.accumulation), steps_per_round(size, training)
        initialization = _initialization(config, delta, sum(sizes))
        noise = _noise(config, delta, rate, steps * rounds, [initialization] if initialization else [])
        plans.append(ClientPlan(size, rate, steps, rounds, delta, noise, initialization))
    return plans


def init_rate(config: Config, num_examples: int) -> float:
    """Returns the probability with which an example is in the sample for the initial gradient."""
    return min(1.0, config.adapter.init_samples / num_examples)


def _initialization(config: Config, delta: float, num_examples: int) -> Mechanism | None:
    privacy, init = config.privacy, config.adapter.init
    every = config.adapter.refresh_every
    times = 1 + ((config.federation.rounds - 1) // every if every else 0)
    if init is Init.gradient:  # only with privacy.unsafe_init
        return Mechanism(0.0, 1.0, times, INITIALIZATION)
    if init is not Init.gradient_dp:
        return None
    rate, noise = init_rate(config, num_examples), privacy.init_noise_multiplier
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
    spent = [] if config.privacy.unsafe_init else already
    return noise_multiplier_for(privacy.epsilon, delta, [(rate, steps)], spent, privacy.accountant.name)


def _delta(given: float | None, units: int) -> float:
    if given is None:
        return default_delta(units)
    check_delta(given, units)
    return given

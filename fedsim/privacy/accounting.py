"""Computes the epsilon of a history of Gaussian mechanisms, and the noise multiplier that a budget needs.

Every epsilon here is an upper bound. Neighbours differ by one unit added or removed (an example, or a client's whole update), the noise has
standard deviation noise_multiplier * clip_norm, and an independent secret coin draws each unit into a step (Poisson sampling).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedsim.errors import UserError
from fedsim.privacy.bounds import ACCOUNTANTS, NO_NOISE, Parts, merged, upper_bound

NAMES = INITIALIZATION, TRAINING = "initialization", "training"
"""The purposes of a mechanism."""

SLACK = 1e-3  # fraction of the target epsilon that a calibration may leave unused
LARGEST_NOISE = 1e6


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a Gaussian mechanism on a Poisson sample; sampling_rate 1 means that every step uses all data.

    `name` is its purpose and does not change the cost. Raises ValueError for values that describe no mechanism.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    name: str = TRAINING

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"Expected a finite noise_multiplier >= 0, got {self}.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"Expected 0 < sampling_rate <= 1, got {self}.")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"Expected a whole number of steps >= 0, got {self}.")
        if self.name not in NAMES:
            raise ValueError(f"Expected a name among {NAMES}, got {self}.")


History = tuple[Mechanism, ...]


def extended(history: Sequence[Mechanism], mechanism: Mechanism) -> History:
    """Returns the history with the mechanism appended, merged into the last one if only the steps differ."""
    if not mechanism.steps:
        return tuple(history)
    if history and replace(history[-1], steps=mechanism.steps) == mechanism:
        return (*history[:-1], replace(mechanism, steps=history[-1].steps + mechanism.steps))
    return (*history, mechanism)


def epsilon(history: Iterable[Mechanism], delta: float, accountant: str = "prv") -> float:
    """Returns an epsilon for which everything in `history` together is (epsilon, delta)-differentially private. Cached by value.

    Guarantees: never below the truth; 0 for an empty history, infinite without noise. `prv` lies at most about 0.5 % above the truth from
    epsilon 0.1 on after 1,000 steps and from epsilon 1 on after 100,000 (below, its grid gets coarse), and never above `rdp`, which
    replaces it where PRV cannot be computed: epsilon near 200, more than 32 different mechanisms, delta below 1e-13 per step, numerical
    failure.
    """
    check_accountant(accountant)
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta=}.")
    return upper_bound(_parts(history), delta, accountant)


def _parts(history: Iterable[Mechanism]) -> Parts:
    return merged((mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps) for mechanism in history)


def exceeds(history: Sequence[Mechanism], budget: float, delta: float, accountant: str = "prv") -> bool:
    """Returns whether `epsilon` is above `budget`; takes milliseconds if the RDP bound is not."""
    check_accountant(accountant)
    if accountant == "prv" and epsilon(history, delta, "rdp") <= budget:
        return False
    return epsilon(history, delta, accountant) > budget


def check_accountant(name: str) -> None:
    """Raises UserError unless `name` is an accountant whose epsilon is a guarantee."""
    if name == "gdp":
        raise UserError("accountant=gdp is refused: it is an approximation that underestimates epsilon. Use prv (tight) or rdp.")
    if name not in ACCOUNTANTS:
        raise UserError(f"Expected an accountant among {', '.join(ACCOUNTANTS)}, got {name!r}.")


def default_delta(num_examples: int) -> float:
    """Returns 1 / n^1.1, which is below 1 / n; one example counts as two, since 1 / 1 would promise nothing."""
    if num_examples < 1:
        raise ValueError(f"Expected at least one example, got {num_examples=}.")
    return float(max(num_examples, 2) ** -1.1)


def check_delta(delta: float, num_examples: int) -> None:
    """Raises UserError unless 0 < delta < 1 / n. 1 / n itself is refused: publishing one example drawn at random satisfies (0, 1 / n)."""
    if not 0 < delta < 1 / num_examples:
        raise UserError(
            f"Expected 0 < delta < 1/n = {1 / num_examples:.3g} for n = {num_examples}, got {delta:g}. "
            f"Leave delta out for 1/n^1.1 = {default_delta(num_examples):.3g}."
        )


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    planned: Iterable[tuple[float, int]],  # (sampling_rate, steps)
    already: Iterable[Mechanism] = (),
    accountant: str = "prv",
) -> float:
    """Returns one noise multiplier for all planned steps, such that `already` and `planned` together stay within the target.

    Guarantees: their `epsilon` is at most `target_epsilon` and at least 99.9 % of it (less only where the bound jumps, see `epsilon`).
    Takes seconds with PRV; cached by value, so clients with equal plans share one calibration. Raises UserError if no noise suffices,
    ValueError if nothing is planned.
    """
    check_accountant(accountant)
    if not 0 < target_epsilon < math.inf:
        raise UserError(f"Expected 0 < epsilon < inf, got {target_epsilon}.")
    plan = merged((1.0, step.sampling_rate, step.steps) for step in (Mechanism(1.0, rate, steps) for rate, steps in planned))
    if not plan:
        raise ValueError("Expected at least one planned step, got none: without steps there is nothing to add noise to.")
    return _calibrated(float(target_epsilon), delta, plan, _parts(already), accountant)


@lru_cache(maxsize=1 << 14)
def _calibrated(target: float, delta: float, plan: Parts, already: Parts, accountant: str) -> float:
    """Calibrates the noise of `plan`, whose parts have noise multiplier 1."""

    def total(noise: float, by: str = accountant) -> float:
        return upper_bound(merged([*already, *((noise * unit, rate, steps) for unit, rate, steps in plan)]), delta, by)

    spent = upper_bound(already, delta, accountant)
    if spent >= target:
        raise UserError(
            f"epsilon {target:g} cannot be kept: {spent:.4g} is spent already (delta {delta:g}). Allow more, or spend less before."
        )
    noise = _least_noise(lambda noise: total(noise, "rdp"), target, guess=1.0)
    if accountant != "rdp":
        noise = _least_noise(total, target, guess=noise or 1.0)
    if noise is None:
        raise UserError(
            f"epsilon {target:g} at delta {delta:g} cannot be reached with accountant {accountant}: "
            f"even noise multiplier {LARGEST_NOISE:g} costs {total(LARGEST_NOISE):.4g}, of which {spent:.4g} was spent before. "
            f"Allow more epsilon{' or use prv' * (accountant == 'rdp')}."
        )
    return noise


def _least_noise(spent: Callable[[float], float], target: float, guess: float) -> float | None:
    """Returns a noise with `spent(noise)` within SLACK below the target, or None if even LARGEST_NOISE spends more.

    `spent` falls roughly as a power of the noise: uses secants in log space, then bisection if they have not converged.
    """
    low, high = 0.0, math.inf  # spent(low) > target >= spent(high)
    noise, power = guess, 1.0
    last: tuple[float, float] | None = None
    for trial in range(200):
        value = spent(noise)
        low, high = (noise, high) if value > target else (low, noise)
        if high <= max(low * (1 + 1e-6), NO_NOISE) or (1 - SLACK) * target <= value <= target:
            return high
        if low >= LARGEST_NOISE:
            return None
        if 0 < value < math.inf:
            if last and last[1] != value:
                power = min(max(-math.log(value / last[1]) / math.log(noise / last[0]), 0.3), 10.0)
            last = (noise, value)
        factor = (value / target / (1 - SLACK / 2)) ** (1 / power)
        noise *= min(max(factor, 0.25), 4.0)
        if trial > 20 or not low < noise < high:
            noise = math.sqrt(max(low, NO_NOISE / 2) * min(high, 2 * LARGEST_NOISE))
    return None if high == math.inf else high


def split_noise(noise_multiplier: float, count_noise: float) -> float:
    """Returns the noise multiplier for the sum of updates under adaptive quantile clipping (Andrew et al., arXiv 1905.03871, Theorem 1).

    A round then releases two sums: the updates, and (b_i - 1/2) with noise of standard deviation `count_noise`, where b_i in {0, 1} says
    whether client i's update was within the clip norm. Guarantees: both together cost as much as one Gaussian mechanism
    with `noise_multiplier`, so charge that. Raises UserError if count_noise is too small.
    """
    if noise_multiplier == 0:
        return 0.0
    if not 2 * count_noise > noise_multiplier:
        raise UserError(
            f"Expected count_noise > noise_multiplier / 2 = {noise_multiplier / 2:g}, got {count_noise:g}: "
            "the count alone would spend it all. A twentieth of the clients in a round is a usual value."
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5

"""Bounds epsilon from below by a membership test: auditing with one run (Steinke, Nasr, Jagielski, arXiv 2305.08846).

An independent fair coin put each of m canaries into the data or not. An adversary who sees the output of an (epsilon, delta)-private
mechanism and guesses r coins is right about no more of them than Binomial(r, e^epsilon / (1 + e^epsilon)), up to a term in delta
(Theorem 5.2). Many right guesses therefore refute small epsilons. One run is enough, since it tests all canaries at once. Any score is
valid: a bad one can only lower the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

PARTS_GUESSED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Fractions of the canaries tried as the number of guesses; the error probability is divided among them, so taking the best is valid."""
HALVINGS = 40  # bisection steps for the bound, from an interval of length 1 or more


@dataclass(frozen=True)
class Bound:
    """The guesses prove, at the requested confidence, that epsilon is at least `epsilon`. 0 proves nothing."""

    epsilon: float
    num_right: int
    num_guesses: int
    num_canaries: int


def p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Returns the largest probability of `num_right` or more right guesses under an (epsilon, delta)-private mechanism (Theorem 5.2).

    Raises ValueError for numbers that describe no audit.
    """
    if not 0 <= num_right <= num_guesses <= num_canaries or not epsilon >= 0 or not 0 <= delta <= 1:
        numbers = f"{num_right=}, {num_guesses=}, {num_canaries=}, {epsilon=}, {delta=}"
        raise ValueError(f"Expected 0 <= right <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1, got {numbers}.")
    if num_right == 0:
        return 1.0
    right = special.expit(epsilon)  # probability that one guess is right
    at_least = float(special.bdtrc(num_right - 1, num_guesses, right))
    if not delta:
        return at_least
    missed_by = np.arange(1, num_right + 1)
    below = 1 - at_least - np.append(special.bdtr(num_right - 1 - missed_by[:-1], num_guesses, right), 0.0)  # P[v > binomial >= v - i]
    return min(1.0, at_least + 2 * num_canaries * delta * float((below / missed_by).max()))


def lower_bound(num_canaries: int, num_guesses: int, num_right: int, delta: float, confidence: float) -> float:
    """Returns the largest epsilon that `num_right` right guesses refute at this confidence, 0 if they refute none."""
    level = 1 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(num_canaries, num_guesses, num_right, epsilon, delta) < level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def num_right(scores: np.ndarray, coins: np.ndarray, num_guesses: int) -> int:
    """Returns the number of right guesses: half guess that the highest scores were in, half that the lowest were not."""
    order = np.argsort(scores, kind="stable")
    lowest, highest = order[: num_guesses // 2], order[len(order) - (num_guesses - num_guesses // 2) :]
    return int((~coins[lowest]).sum() + coins[highest].sum())


def audit(scores: Sequence[float] | np.ndarray, coins: Sequence[bool] | np.ndarray, delta: float, confidence: float) -> Bound:
    """Returns the best bound over several numbers of guesses, valid at this confidence.

    `scores` are higher for canaries that seem to have been in; `coins` says which were. Raises ValueError if their lengths differ or
    they are empty.
    """
    scores, coins = np.asarray(scores, dtype=float), np.asarray(coins, dtype=bool)
    if len(scores) != len(coins) or not len(scores):
        raise ValueError(f"Expected a score for each of one or more canaries, got {len(scores)} scores of {len(coins)}.")
    counts = sorted({max(1, round(part * len(scores))) for part in PARTS_GUESSED})
    each = 1 - (1 - confidence) / len(counts)
    bounds = []
    for count in counts:
        right = num_right(scores, coins, count)
        bounds.append(Bound(lower_bound(len(scores), count, right, delta, each), right, count, len(scores)))
    return max(bounds, key=lambda bound: bound.epsilon)

"""Client-level noise that the clients add themselves, on the integers of the secure sum: the Skellam mechanism (arXiv 2110.04995).

A Skellam number is the difference of two Poisson numbers, and the sum of Skellam numbers is one, with the sum of their variances. So each
of c clients adds a part, any `fewest` of them together give all the noise, and the server never sees a sum without it.

Sensitivity: an update is clipped to `quantizer.range`, shrunk a little so that stochastic rounding keeps its L2 norm within
quantizer.limit with probability 0.39 at least (arXiv 2102.06387, Proposition 26), and rounded again until it is. So the integers of one
client have an L2 norm of at most quantizer.limit, rounding included, whatever the update; their L1 norm is at most the square of it.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedsim.core.quantization import Quantizer, round_at_random
from fedsim.errors import UserError

TRIALS = 200
"""Roundings before an update is rounded towards zero instead, which is always short enough; it takes 0.61^200 of luck to get there."""


def clipped_integers(update: NDArray[np.float64], quantizer: Quantizer, generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns the clipped update in steps of the quantizer, of an L2 norm of at most its limit. Raises UserError if they are too fine."""
    norm = float(np.linalg.norm(update))
    exact = update * (_reach(len(update), quantizer.limit) / max(norm, quantizer.range))
    for _ in range(TRIALS):
        found = round_at_random(exact, generator)
        if int(np.dot(found, found)) <= quantizer.limit**2:
            return found
    return np.trunc(exact).astype(np.int64)


def skellam_noise(size: int, variance: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns independent Skellam numbers of mean zero."""
    return generator.poisson(variance / 2, size) - generator.poisson(variance / 2, size)


def share_of_variance(noise_multiplier: float, quantizer: Quantizer, fewest: int) -> float:
    """Returns the variance of one client's noise, of which `fewest` give a deviation of noise_multiplier * quantizer.limit together."""
    return (noise_multiplier * quantizer.limit) ** 2 / fewest


def _reach(size: int, limit: int) -> float:
    """Returns the largest norm s with s^2 + s + size / 4 + sqrt(size) / 2 <= limit^2."""
    room = limit**2 - size / 4 - sqrt(size) / 2
    if room < 2:
        raise UserError(
            f"secure.bits: rounding {size:,} parameters to a grid with norms up to {limit} would be all noise; use more bits, "
            f"or a smaller adapter."
        )
    return (sqrt(1 + 4 * room) - 1) / 2

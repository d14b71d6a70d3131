"""Client-level noise that the clients add to their integers in the secure sum: the Skellam mechanism (arXiv 2110.04995).

A Skellam number is the difference of two Poisson numbers; a sum of independent Skellam numbers is Skellam, and its variance is the sum of
theirs. So each client adds a share of the noise, any `fewest` clients together give all of it, and the server never sees a sum without it.

Sensitivity: an update is clipped to `quantizer.range`, shrunk a little so that stochastic rounding keeps its L2 norm within
quantizer.limit with probability at least 0.39 (arXiv 2102.06387, Proposition 26), and rounded again until it does. So one client's
integers have an L2 norm of at most quantizer.limit, rounding included, for any update; their L1 norm is at most its square.
"""

from math import sqrt

import numpy as np
from numpy.typing import NDArray

from fedsim.core.quantization import Quantizer, round_at_random
from fedsim.errors import UserError

TRIALS = 200
"""Stochastic roundings before an update is rounded towards zero, which never exceeds the limit; the chance of that is 0.61^200 at most."""


def clipped_integers(update: NDArray[np.float64], quantizer: Quantizer, generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns the clipped update in steps of the quantizer, with an L2 norm of at most its limit. Raises UserError for too few bits."""
    norm = float(np.linalg.norm(update))
    exact = update * (_largest_norm(len(update), quantizer.limit) / max(norm, quantizer.range))
    for _ in range(TRIALS):
        found = round_at_random(exact, generator)
        if int(np.dot(found, found)) <= quantizer.limit**2:
            return found
    return np.trunc(exact).astype(np.int64)


def skellam_noise(size: int, variance: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns `size` independent Skellam numbers of mean zero."""
    return generator.poisson(variance / 2, size) - generator.poisson(variance / 2, size)


def share_of_variance(noise_multiplier: float, quantizer: Quantizer, fewest: int) -> float:
    """Returns the variance of one client's noise, so that `fewest` clients give a deviation of noise_multiplier * quantizer.limit."""
    return (noise_multiplier * quantizer.limit) ** 2 / fewest


def _largest_norm(size: int, limit: int) -> float:
    """Returns the largest norm s with s^2 + s + size / 4 + sqrt(size) / 2 <= limit^2."""
    room = limit**2 - size / 4 - sqrt(size) / 2
    if room < 2:
        raise UserError(
            f"secure.bits: rounding {size:,} parameters to a grid with norms up to {limit} would be all noise; use more bits, "
            f"or a smaller adapter."
        )
    return (sqrt(1 + 4 * room) - 1) / 2

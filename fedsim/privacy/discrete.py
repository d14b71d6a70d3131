"""Bounds the cost of secure aggregation's discrete noise by that of a Gaussian mechanism.

A Skellam mechanism of variance mu on integers, with sensitivities D2 (L2) and D1 <= D2^2 (L1), satisfies Renyi differential privacy at
every integer order a >= 2 with a D2^2 / (2 mu) + ((2 a - 1) D2^2 + 6 D1) / (4 mu^2) (arXiv 2110.04995, Theorem 3.5). With D2 = limit and
mu = (z limit)^2 that is at most a / 2 * (1 / z^2 + 2.5 / (z^4 limit^2)): the cost of a Gaussian mechanism of that precision, at these
orders. So it composes like one, under the accountant `skellam`, which uses integer orders only.
"""

from math import sqrt

EXCESS = 2.5


def gaussian_of_skellam(noise_multiplier: float, limit: int) -> float:
    """Returns the noise multiplier of a Gaussian mechanism that costs at least as much at every integer order."""
    if noise_multiplier == 0:
        return 0.0
    return 1 / sqrt(noise_multiplier**-2 + EXCESS * noise_multiplier**-4 / limit**2)


def skellam_of_gaussian(noise_multiplier: float, limit: int) -> float:
    """Returns the inverse of `gaussian_of_skellam`."""
    if noise_multiplier == 0:
        return 0.0
    precision = noise_multiplier**-2
    return 1 / sqrt(2 * precision / (1 + sqrt(1 + 4 * EXCESS * precision / limit**2)))

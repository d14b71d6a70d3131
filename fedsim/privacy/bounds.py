"""Upper bounds on epsilon by Opacus's accountants: PRV (Gopi et al., arXiv 2106.02848) and RDP (Mironov et al., arXiv 1908.10530).

Opacus's PRV accountant has an absolute error, a cost inverse to it, and inputs on which it fails. This module chooses the error, and where
PRV fails it falls back to the RDP bound: looser, never below the truth.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.integrate import IntegrationWarning

Parts = tuple[tuple[float, float, int], ...]
"""(noise_multiplier, sampling_rate, steps), as returned by `merged`: all that epsilon depends on. Order does not matter."""

NO_NOISE = 1e-3
"""Noise below this counts as none, because the arithmetic overflows; it protects no one beyond what sampling does."""

ORDERS = [1 + x / 10 for x in range(1, 100)] + [float(x) for x in (*range(11, 64), 128, 256, 512, 1024)]
"""The Renyi orders that dp-accounting uses; the large ones serve small epsilons."""

PRV_ERROR = 0.004  # fraction of epsilon that the upper bound adds for the grid
PRV_POINTS = 1 << 21  # of the grid: about 3 s and half a GB
PRV_EPSILON = 200.0  # largest half-width of the grid: exp(privacy loss) must stay far from the end of float64
PRV_MECHANISMS = 32  # different ones: each takes about 0.2 s
PRV_ROUNDING = 1e-13  # delta per step: Fourier transforms in float64 lose tails of about 1e-14 per step


def merged(parts: Iterable[tuple[float, float, int]]) -> Parts:
    """Adds up the steps of equal mechanisms, and merges all that are not subsampled into one Gaussian, exactly (arXiv 1905.02383)."""
    steps: dict[tuple[float, float], int] = {}
    for noise, rate, count in parts:
        steps[noise, rate] = steps.get((noise, rate), 0) + count
    sampled = [(noise, rate, count) for (noise, rate), count in steps.items() if count and (rate < 1 or noise < NO_NOISE)]
    precision = math.fsum(count / noise**2 for (noise, rate), count in steps.items() if rate == 1 and noise >= NO_NOISE)
    return tuple(sorted([*sampled, *([(precision**-0.5, 1.0, 1)] if precision else [])]))


@lru_cache(maxsize=1 << 16)
def upper_bound(parts: Parts, delta: float, accountant: str) -> float:
    """Returns the epsilon of merged parts: 0 without any, infinite if one has no noise."""
    if not parts:
        return 0.0
    if min(noise for noise, _, _ in parts) < NO_NOISE:
        return math.inf
    return ACCOUNTANTS[accountant](parts, delta)


def rdp_epsilon(parts: Parts, delta: float) -> float:
    """Returns the RDP bound; takes 0.1 s for each new pair of noise and rate, and next to nothing afterwards."""
    return _best_order(parts, delta, range(len(ORDERS)))


def whole_order_epsilon(parts: Parts, delta: float) -> float:
    """Returns the RDP bound over integer orders only, for noise whose cost is known only there (see `discrete`)."""
    return _best_order(parts, delta, [place for place, order in enumerate(ORDERS) if order.is_integer()])


def _best_order(parts: Parts, delta: float, places: Iterable[int]) -> float:
    chosen, spent = list(places), sum(n * _rdp_of_a_step(s, q) for s, q, n in parts)
    with _loose_orders_ignored():
        best, _ = get_privacy_spent(orders=[ORDERS[place] for place in chosen], rdp=np.asarray(spent)[chosen], delta=delta)
    return max(0.0, float(best))


def prv_epsilon(parts: Parts, delta: float) -> float:
    """Returns the smaller of PRV's upper bound and RDP's.

    A first pass derives the error from the RDP bound; if that was loose, a second pass derives it from the first pass's estimate. Both
    choices agree where they switch: the result is continuous in the noise, as calibration needs.
    """
    bound = rdp_epsilon(parts, delta)
    total, error_of_delta = sum(steps for _, _, steps in parts), delta / 1000
    tails = [rdp_epsilon(((noise, rate, 1),), error_of_delta / 8 / total) for noise, rate, _ in parts]
    half_width = 3 + max(rdp_epsilon(parts, error_of_delta / 4), *tails)  # as Opacus chooses it
    if half_width > PRV_EPSILON or len(parts) > PRV_MECHANISMS or delta < PRV_ROUNDING * total:
        return bound
    least_error = 2 * half_width / PRV_POINTS * math.sqrt(total * math.log(12 / error_of_delta) / 2)
    error = max(bound * PRV_ERROR / 2, least_error)
    if error > 0.5:  # Opacus's half_width is only known to be safe for errors below 1
        return bound
    upper = _prv_upper_bound(parts, delta, error)
    finer = max((upper - error) * PRV_ERROR, least_error)
    if finer < error:
        upper = _prv_upper_bound(parts, delta, finer)
    return max(0.0, min(upper, bound))


ACCOUNTANTS: dict[str, Callable[[Parts, float], float]] = {"prv": prv_epsilon, "rdp": rdp_epsilon, "skellam": whole_order_epsilon}


def _prv_upper_bound(parts: Parts, delta: float, error: float) -> float:
    """Returns Opacus's upper bound, or infinity, which is a bound too, if its numerics fail."""
    accountant = PRVAccountant()
    accountant.history = list(parts)
    try:
        with _loose_orders_ignored(), np.errstate(divide="ignore", over="raise", invalid="raise"):  # log(1 - rate) is -inf at rate 1
            warnings.filterwarnings("error", category=IntegrationWarning)
            upper = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, FloatingPointError, IntegrationWarning):
        return math.inf
    return upper if math.isfinite(upper) else math.inf


@lru_cache(maxsize=1 << 14)
def _rdp_of_a_step(noise: float, rate: float) -> NDArray[np.float64]:  # [orders]
    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS))


class _loose_orders_ignored(warnings.catch_warnings):  # noqa: N801 - reads as a statement
    """Silences Opacus's hint that other orders would give a smaller bound: its result is a valid bound."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="Optimal order is the (smallest|largest) alpha")

"""Epsilon computed independently: by dp-accounting, by integrated Renyi divergences, and in closed form for the Gaussian mechanism."""

import math
from functools import cache

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

STEPS = (1, 10, 100, 1000, 10000)
RATES = (0.002, 0.01, 0.05, 0.3, 1.0)
NOISES = ((0.7, 1e-5), (1.0, 1e-3), (2.0, 1e-7), (4.0, 1e-5))  # noise multiplier in units that keep epsilon below 20, delta

GRID = [(noise * max(1.0, rate * math.sqrt(steps)), rate, steps, delta) for steps in STEPS for rate in RATES for noise, delta in NOISES]
SAMPLE = [GRID[(7 * index) % len(GRID)] for index in range(20)]
REST = [point for point in GRID if point not in SAMPLE]


def _composed(accountant, parts):
    for noise, rate, steps in parts:
        event = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), steps)
    return accountant


@cache
def pld_epsilon(parts, delta):
    """Epsilon of ((noise_multiplier, sampling_rate, steps), ...) by dp-accounting's privacy loss distributions."""
    interval = 1e-4 if rdp_epsilon(parts, delta) < 2 else 3e-4  # finer changes nothing that the tests would see, and costs seconds
    return _composed(PLDAccountant(value_discretization_interval=interval), parts).get_epsilon(delta)


@cache
def rdp_epsilon(parts, delta):
    """Epsilon of ((noise_multiplier, sampling_rate, steps), ...) by dp-accounting's Renyi accountant."""
    return _composed(RdpAccountant(), parts).get_epsilon(delta)


def integrated_rdp_epsilon(noise, rate, steps, delta, orders):
    """Epsilon from the Renyi divergences of one step, integrated by the trapezoidal rule; accountants use series."""
    best = math.inf
    for order in orders:
        x = np.linspace(-14 * noise, order + 1 + 14 * noise, 200_001)
        log_ratio = (2 * x - 1) / (2 * noise**2)
        if rate < 1:
            log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio)
        log_integrand = order * log_ratio - x**2 / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
        largest = log_integrand.max()
        divergence = (largest + math.log(np.exp(log_integrand - largest).sum() * (x[1] - x[0]))) / (order - 1)
        best = min(best, steps * divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))  # arXiv 2004.00010, Prop. 12
    return max(0.0, best)


def gaussian_epsilon(noise, steps, delta):
    """Epsilon of Gaussian mechanisms without subsampling, in closed form (Balle and Wang, arXiv 1805.06530, Theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon):
        return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

    return 0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, 10 * mu * (mu + 10), xtol=1e-12)

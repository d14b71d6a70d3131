"""The privacy cost of Skellam noise against the privacy loss, summed over the integers."""

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions
from scipy.special import ive, logsumexp

from fedsim.privacy.accounting import Mechanism, epsilon, exceeds, noise_multiplier_for
from fedsim.privacy.discrete import gaussian_of_skellam, skellam_of_gaussian


def log_pmf(points, mu):
    """Logarithm of a Skellam pmf of variance mu, exp(-mu) I_k(mu); -inf where that underflows, which is too far out to matter here."""
    with np.errstate(divide="ignore"):
        return np.log(ive(np.abs(points), mu))


def renyi(mu, shift, order):
    """The Renyi divergence of order `order` between a Skellam number and a shifted one, summed over the integers."""
    points = np.arange(-order * shift - int(20 * mu**0.5) - 40, order * shift + int(20 * mu**0.5) + 41)
    own, other = log_pmf(points, mu), log_pmf(points - shift, mu)
    here = np.isfinite(own) & np.isfinite(other)
    return float(logsumexp(order * own[here] - (order - 1) * other[here])) / (order - 1)


ORDERS = (2, 3, 4, 6, 8, 12)


@pytest.mark.parametrize("noise_multiplier", [0.8, 1.5, 4.0])
@pytest.mark.parametrize(
    ("limit", "size", "step", "slack"),  # `size` entries change by `step`, which is a norm of `limit`
    [(8, 1, 8, 1.6), (8, 16, 2, 1.15), (8, 4, 4, 1.3), (16, 1, 16, 1.25), (64, 1, 64, 1.02), (128, 1, 128, 1.006), (64, 4096, 1, 1.002)],
)
def test_no_direction_of_a_change_costs_more_than_the_equivalent_gaussian(noise_multiplier, limit, size, step, slack):
    assert size * step**2 == limit**2
    mu, equivalent = (noise_multiplier * limit) ** 2, gaussian_of_skellam(noise_multiplier, limit)
    for order in ORDERS:
        true = size * renyi(mu, step, order)
        claimed = order / (2 * equivalent**2)
        assert true <= claimed * (1 + 1e-9), order
        assert claimed <= slack * true, order


@pytest.mark.parametrize("limit", [1, 8, 127])
@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 4.0])
def test_the_published_bound_is_not_undercut_at_any_whole_order(noise_multiplier, limit):
    mu, l2, l1 = (noise_multiplier * limit) ** 2, limit, limit**2
    equivalent = gaussian_of_skellam(noise_multiplier, limit)
    for order in range(2, 1025):
        published = order * l2**2 / (2 * mu) + min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
        assert order / (2 * equivalent**2) >= published * (1 - 1e-12), order


def test_on_a_fine_grid_the_noise_costs_what_gaussian_noise_costs():
    for noise_multiplier in (0.5, 1.0, 5.0):
        assert gaussian_of_skellam(noise_multiplier, 32767) == pytest.approx(noise_multiplier, rel=1e-7)
        for limit in (4, 127, 32767):
            assert skellam_of_gaussian(gaussian_of_skellam(noise_multiplier, limit), limit) == pytest.approx(noise_multiplier, rel=1e-9)
            assert gaussian_of_skellam(noise_multiplier, limit) <= noise_multiplier
    assert gaussian_of_skellam(0.0, 7) == skellam_of_gaussian(0.0, 7) == 0.0


@pytest.mark.parametrize(("noise_multiplier", "limit", "rounds", "delta"), [(1.0, 8, 1, 1e-3), (2.0, 8, 10, 1e-2), (5.0, 16, 30, 1e-5)])
def test_epsilon_is_above_the_privacy_loss_summed_over_the_integers_and_near_it(noise_multiplier, limit, rounds, delta):
    mu = (noise_multiplier * limit) ** 2
    points = np.arange(-int(14 * mu**0.5) - 40, int(14 * mu**0.5) + 41)
    upper, lower = (dict(zip(points.tolist(), log_pmf(points - shift, mu).tolist(), strict=True)) for shift in (0, limit))
    loss = from_two_probability_mass_functions(lower, upper, pessimistic_estimate=False, value_discretization_interval=1e-3)
    true = loss.self_compose(rounds).get_epsilon_for_delta(delta)
    claimed = epsilon([Mechanism(gaussian_of_skellam(noise_multiplier, limit), 1.0, rounds)], delta, "skellam")
    assert true < claimed < 1.4 * true


def test_a_calibrated_budget_is_kept_and_nearly_spent():
    noise = noise_multiplier_for(3.0, 1e-3, [(1.0, 12)], (), "skellam")
    history = [Mechanism(noise, 1.0, 12)]
    assert 0.998 * 3 <= epsilon(history, 1e-3, "skellam") <= 3
    assert not exceeds(history, 3.0, 1e-3, "skellam")
    assert exceeds([*history, *history], 3.0, 1e-3, "skellam")
    assert epsilon(history, 1e-3, "rdp") <= epsilon(history, 1e-3, "skellam"), "whole orders are some of all"


def test_a_budget_between_the_rdp_and_skellam_epsilons_is_exceeded_only_with_skellam():
    history = [Mechanism(0.6, 1.0, 12)]
    rdp, whole = (epsilon(history, 1e-2, name) for name in ("rdp", "skellam"))
    assert rdp < whole
    assert exceeds(history, (rdp + whole) / 2, 1e-2, "skellam")
    assert not exceeds(history, (rdp + whole) / 2, 1e-2, "rdp")

"""Sensitivity and noise of client-level privacy on integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from fedsim.core.distributed_noise import clipped_integers, share_of_variance, skellam_noise
from fedsim.core.quantization import Quantizer, limit_of
from fedsim.errors import UserError


def quantizer_of(bits=8, clip_norm=0.5, clients=5):
    return Quantizer(clip_norm, limit_of(bits), clients, 4)


@given(arrays.arrays(np.float64, st.integers(1, 300), elements=st.floats(-9, 9)), st.integers(0, 99), st.sampled_from([7, 8, 12, 16]))
@settings(max_examples=80)
def test_the_norm_of_clipped_integers_never_exceeds_the_limit(update, seed, bits):
    quantizer = quantizer_of(bits)
    found = clipped_integers(update, quantizer, np.random.default_rng(seed))
    assert found.dtype == np.int64
    assert int((found**2).sum()) <= quantizer.limit**2
    assert np.abs(found).sum() <= (found**2).sum(), "the L1 norm of integers is at most the square of their L2 norm"


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_integers_average_to_the_clipped_update(scale):
    quantizer, generator = quantizer_of(10), np.random.default_rng(0)
    update = np.random.default_rng(1).normal(size=200)
    update *= scale * 0.5 / np.linalg.norm(update)
    expected = update * min(1.0, 0.5 / np.linalg.norm(update))
    found = np.mean([clipped_integers(update, quantizer, generator) for _ in range(400)], axis=0) * quantizer.step
    assert np.abs(found - expected).max() < 0.15 * quantizer.step + 2e-3 * np.abs(expected).max()


def test_more_parameters_than_the_bits_can_round_are_refused():
    with pytest.raises(UserError, match=r"secure.bits: rounding 100,000 parameters"):
        clipped_integers(np.zeros(100_000), quantizer_of(8), np.random.default_rng(0))


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_the_fewest_survivors_add_the_full_noise_and_not_two_thirds_or_three_halves_of_it(noise_multiplier):
    quantizer, fewest = quantizer_of(), 3

    def sigma(factor):
        variance = share_of_variance(noise_multiplier * factor, quantizer, fewest)
        total = sum(skellam_noise(20_000, variance, np.random.default_rng(client)) for client in range(fewest))
        return total.std() / quantizer.limit

    assert sigma(1.0) == pytest.approx(noise_multiplier, rel=0.03)
    for factor in (2 / 3, 3 / 2):
        assert sigma(factor) != pytest.approx(noise_multiplier, rel=0.03)


@pytest.mark.parametrize("clients", [1, 4])
def test_the_sum_of_the_clients_noise_follows_the_skellam_distribution(clients):
    generator, variance = np.random.default_rng(0), 9.0
    total = sum(skellam_noise(50_000, variance / clients, generator) for _ in range(clients))
    cells = np.arange(-9, 10)
    observed = np.array([(total == cell).sum() for cell in cells])
    expected = stats.skellam(variance / 2, variance / 2).pmf(cells) * len(total)
    rest = len(total) - observed.sum(), len(total) - expected.sum()
    assert stats.chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue > 1e-3


def test_a_noise_multiplier_of_zero_adds_no_noise():
    assert not skellam_noise(100, share_of_variance(0.0, quantizer_of(), 2), np.random.default_rng(0)).any()

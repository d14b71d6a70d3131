import math

import numpy as np
import pytest
from scipy.special import expit, logit

from fedsim.privacy.auditing import Bound, audit, lower_bound, num_right, p_value
from fedsim.privacy.canaries import NUM_TOKENS, canaries

CONFIDENCE = 0.95


def brute_force_p_value(m, r, v, epsilon, delta):
    """Theorem 5.2 by summing the binomial's terms, separately for every i."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    terms = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(terms[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(terms[v:]) + 2 * m * delta * alpha)


def randomized_response(epsilon, count, rng):
    """Returns scores that report each coin with the probability that epsilon allows and its opposite otherwise, and the coins."""
    coins = rng.random(count) < 0.5
    reported = coins ^ (rng.random(count) >= expit(epsilon))
    return reported + rng.random(count) / 2, coins


@pytest.mark.parametrize("guesses", [8, 60, 500])
def test_perfect_guesses_give_the_bound_of_the_binomial(guesses):
    probability = (1 - CONFIDENCE) ** (1 / guesses)  # q^r = 1 - confidence
    assert lower_bound(1000, guesses, guesses, 0.0, CONFIDENCE) == pytest.approx(logit(probability), abs=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("m", "r", "v"), [(100, 100, 80), (300, 50, 50), (64, 20, 3), (10, 4, 0)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
def test_the_p_value_is_that_of_the_theorem(m, r, v, epsilon, delta):
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(brute_force_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-14)


def test_the_p_value_at_the_bound_is_one_minus_the_confidence():
    bound = lower_bound(200, 150, 140, 1e-4, CONFIDENCE)
    assert brute_force_p_value(200, 150, 140, bound, 1e-4) == pytest.approx(1 - CONFIDENCE, rel=1e-6)


def test_the_bound_decreases_with_delta_and_confidence():
    bounds = [lower_bound(500, 100, 99, delta, confidence) for delta, confidence in [(0.0, 0.9), (0.0, 0.99), (1e-4, 0.99), (1e-2, 0.99)]]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0.0


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_is_below_the_epsilon_of_randomized_response_and_near_it(epsilon):
    rng = np.random.default_rng(1)
    bounds = np.array([audit(*randomized_response(epsilon, 400, rng), 0.0, CONFIDENCE).epsilon for _ in range(100)])
    assert (bounds > epsilon).sum() <= 11  # of 100 at a level of 5 %: more has probability 0.4 %
    assert epsilon == 0 or np.median(bounds) > 0.65 * epsilon


def test_delta_covers_a_mechanism_that_reveals_a_few_coins():
    rng, delta, refuted = np.random.default_rng(2), 0.02, {0.0: 0, 0.02: 0}
    for _ in range(50):
        coins, reported = rng.random(300) < 0.5, rng.random(300) < delta
        scores = np.where(reported, coins * 2.0 - 1, (rng.random(300) - 0.5) / 2)
        for assumed in refuted:
            refuted[assumed] += audit(scores, coins, assumed, CONFIDENCE).epsilon > 0
    assert refuted[delta] <= 5
    assert refuted[0.0] > refuted[delta]


def test_the_highest_scores_are_guessed_in_and_the_lowest_out():
    coins = np.array([True, False, False, True, True])
    assert num_right(np.array([3.0, -2.0, 0.0, 1.0, 2.0]), coins, 3) == 3
    assert num_right(np.array([-3.0, 2.0, 0.0, -1.0, -2.0]), coins, 3) == 0
    assert audit([5.0], [True], 0.0, CONFIDENCE) == Bound(0.0, 1, 1, 1)


def test_invalid_audits_are_refused():
    with pytest.raises(ValueError, match="right <= guesses"):
        p_value(10, 5, 6, 1.0, 0.0)
    with pytest.raises(ValueError, match="a score for each"):
        audit([1.0], [], 0.0, CONFIDENCE)


def test_canaries_are_dealt_in_turn_and_their_coins_are_fair():
    found = canaries(2000, 3, list(range(10, 40)), seed=5)
    assert [each.client for each in found[:4]] == [0, 1, 2, 0]
    assert abs(sum(each.inside for each in found) - 1000) < 100
    assert all(each.example.num_tokens == NUM_TOKENS and set(each.example.input_ids) <= set(range(10, 40)) for each in found)
    assert found == canaries(2000, 3, list(range(10, 40)), seed=5) != canaries(2000, 3, list(range(10, 40)), seed=6)

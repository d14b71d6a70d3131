import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant
from privacy_oracles import GRID, REST, SAMPLE, gaussian_epsilon, integrated_rdp_epsilon, pld_epsilon, rdp_epsilon

from fedsim.errors import UserError
from fedsim.privacy import bounds
from fedsim.privacy.accounting import (
    Mechanism,
    check_accountant,
    check_delta,
    default_delta,
    epsilon,
    exceeds,
    extended,
    noise_multiplier_for,
    split_noise,
)

DELTA = 1e-5
INITIALIZATION = Mechanism(4.0, 1.0, 1, "initialization")


def parts(history):
    return tuple((m.noise_multiplier, m.sampling_rate, m.steps) for m in history)


def planned(noise, plan):
    return [Mechanism(noise, rate, steps) for rate, steps in plan]


# ---- against independent accountants


def assert_agrees_with_dp_accounting(noise, rate, steps, delta):
    history = [Mechanism(noise, rate, steps)]
    assert epsilon(history, delta) == pytest.approx(pld_epsilon(parts(history), delta), rel=0.01, abs=2e-4)
    by_rdp, theirs = epsilon(history, delta, "rdp"), rdp_epsilon(parts(history), delta)
    if by_rdp < 0.999 * theirs:  # dp-accounting leaves out the orders for which its series does not converge: compare with the integrals
        theirs = integrated_rdp_epsilon(noise, rate, steps, delta, bounds.ORDERS)
    assert by_rdp == pytest.approx(theirs, rel=0.001, abs=1e-6)


def test_the_grid_has_100_different_points():
    assert len(set(GRID)) == 100
    assert len(SAMPLE) == 20
    assert len(REST) == 80


@pytest.mark.parametrize("point", SAMPLE)
def test_epsilons_agree_with_dp_accounting(point):
    assert_agrees_with_dp_accounting(*point)


@pytest.mark.slow
@pytest.mark.parametrize("point", REST)
def test_epsilons_agree_with_dp_accounting_on_the_rest_of_the_grid(point):
    assert_agrees_with_dp_accounting(*point)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GRID[::5])
def test_rdp_agrees_with_integrated_divergences(noise, rate, steps, delta):
    ours = epsilon([Mechanism(noise, rate, steps)], delta, "rdp")
    assert ours == pytest.approx(integrated_rdp_epsilon(noise, rate, steps, delta, bounds.ORDERS), rel=0.001, abs=1e-6)


ROUNDS = [Mechanism(1.2, 0.02, 40), Mechanism(1.2, 0.05, 40), Mechanism(1.2, 0.02, 40), Mechanism(1.5, 0.05, 25)]


@pytest.mark.parametrize("start", [[], [INITIALIZATION], [Mechanism(2.0, 0.3, 3, "initialization")]])
def test_rounds_with_changing_participation_and_an_initialization_agree_with_dp_accounting(start):
    history = [*start, *ROUNDS]
    assert epsilon(history, DELTA) == pytest.approx(pld_epsilon(parts(history), DELTA), rel=0.01)
    assert epsilon(history, DELTA, "rdp") == pytest.approx(rdp_epsilon(parts(history), DELTA), rel=0.001)


@settings(max_examples=20)
@given(st.floats(0.3, 100), st.integers(1, 1000), st.floats(-8, -1))
def test_without_subsampling_epsilon_lies_just_above_the_closed_form(noise, steps, exponent):
    delta = 10**exponent
    truth = gaussian_epsilon(noise, steps, delta)
    spent = epsilon([Mechanism(noise, 1.0, steps)], delta)
    assert truth * (1 - 1e-9) <= spent
    assert spent <= 1.01 * truth + 5e-4 or spent == epsilon([Mechanism(noise, 1.0, steps)], delta, "rdp")


def test_epsilon_lies_just_above_opacus_lower_bound():
    accountant = PRVAccountant()
    accountant.history = [(1.1, 0.03, 500)]
    lower = accountant.get_epsilon(DELTA, eps_error=0.001) - 0.002
    assert lower < epsilon([Mechanism(1.1, 0.03, 500)], DELTA) < 1.006 * lower + 0.002


def test_gdp_is_refused_because_it_underestimates():
    with pytest.raises(UserError, match="underestimates"):
        check_accountant("gdp")
    with pytest.warns(UserWarning, match="underestimate"):
        accountant = GaussianAccountant()
    accountant.history = [(0.7, 0.01, 100)]
    assert accountant.get_epsilon(delta=DELTA) < 0.8 * pld_epsilon(((0.7, 0.01, 100),), DELTA)
    with pytest.raises(UserError, match="Expected an accountant among prv, rdp, skellam, got 'moments'"):
        epsilon([], DELTA, "moments")


# ---- what composition means


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_zero_without_steps_and_infinite_without_noise(accountant):
    assert epsilon([], DELTA, accountant) == 0
    assert epsilon([Mechanism(0.0, 0.5, 0)], DELTA, accountant) == 0
    for rate in (0.001, 1.0):
        assert epsilon([*ROUNDS, Mechanism(0.0, rate, 1)], DELTA, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_order_and_the_names_of_mechanisms_do_not_matter(accountant):
    history = [INITIALIZATION, *ROUNDS]
    shuffled = random.Random(0).sample(history, len(history))
    assert epsilon(shuffled, DELTA, accountant) == epsilon(history, DELTA, accountant)
    assert epsilon([Mechanism(4.0, 1.0, 1), *ROUNDS], DELTA, accountant) == epsilon(history, DELTA, accountant)


def test_an_initialization_increases_epsilon_by_less_than_its_own_epsilon():
    training, start = epsilon(ROUNDS, DELTA), epsilon([INITIALIZATION], DELTA)
    assert max(training, start) < epsilon([INITIALIZATION, *ROUNDS], DELTA) < training + start


def test_consecutive_equal_mechanisms_are_merged():
    history = ()
    for mechanism in (
        INITIALIZATION,
        *[Mechanism(1.0, 0.1, 10)] * 3,
        Mechanism(1.0, 0.2, 10),
        Mechanism(1.0, 0.1, 0),
        Mechanism(1.0, 0.2, 1),
    ):
        history = extended(history, mechanism)
    assert history == (INITIALIZATION, Mechanism(1.0, 0.1, 30), Mechanism(1.0, 0.2, 11))


WITHOUT_PRV = {
    "so little noise that exp(privacy loss) overflows": ([Mechanism(0.05, 0.5, 10)], DELTA),
    "a delta that float64 loses after so many steps": ([Mechanism(3.0, 0.01, 5000)], 1e-11),
    "too many different mechanisms": ([Mechanism(2.0 + i / 10, 0.01, 1) for i in range(40)], DELTA),
}


@pytest.mark.parametrize("case", WITHOUT_PRV)
def test_rdp_is_used_where_prv_cannot_be_computed(case):
    assert epsilon(*WITHOUT_PRV[case]) == epsilon(*WITHOUT_PRV[case], "rdp") > 0


def test_prv_that_fails_is_replaced_by_rdp(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fail)
    history = [Mechanism(1.2345, 0.0321, 77)]
    assert epsilon(history, DELTA) == epsilon(history, DELTA, "rdp")


@pytest.mark.parametrize("fields", [(-1.0, 0.1, 1), (math.inf, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)])
def test_invalid_mechanisms_are_refused(fields):
    with pytest.raises(ValueError, match="Expected"):
        Mechanism(*fields)
    with pytest.raises(ValueError, match="Expected a name"):
        Mechanism(1.0, 0.1, 1, "evaluation")


def test_a_budget_is_exceeded_exactly_when_epsilon_is_above_it():
    spent = epsilon(ROUNDS, DELTA)
    loose = epsilon(ROUNDS, DELTA, "rdp")
    assert [exceeds(ROUNDS, budget, DELTA) for budget in (spent * 0.999, spent, (spent + loose) / 2, loose * 1.1)] == [
        True,
        False,
        False,
        False,
    ]


# ---- calibration

PLANS = {
    "one client": (3.0, 1e-4, [(0.04, 120)], []),
    "every example in every step": (1.0, 1e-5, [(1.0, 20)], []),
    "changing rates": (2.0, 1e-5, [(0.02, 100), (0.1, 30), (0.02, 50)], []),
    "after an initialization": (3.0, 1e-5, [(0.01, 500)], [INITIALIZATION]),
    "generous": (20.0, 1e-3, [(0.1, 100)], []),
}


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("plan", PLANS)
def test_calibration_reaches_its_target_from_below(plan, accountant):
    target, delta, steps, already = PLANS[plan]
    noise = noise_multiplier_for(target, delta, steps, already, accountant)
    assert 0.999 * target <= epsilon([*already, *planned(noise, steps)], delta, accountant) <= target


@pytest.mark.parametrize("plan", ["one client", "every example in every step", "after an initialization"])
def test_an_independent_accountant_accepts_the_calibrated_noise_and_refuses_two_thirds_of_it(plan):
    target, delta, steps, already = PLANS[plan]
    noise = noise_multiplier_for(target, delta, steps, already)
    assert 0.99 * target <= pld_epsilon(parts([*already, *planned(noise, steps)]), delta) <= 1.001 * target
    assert pld_epsilon(parts([*already, *planned(noise * 2 / 3, steps)]), delta) > 1.1 * target


def test_equal_plans_are_calibrated_once():
    first = noise_multiplier_for(2.0, DELTA, [(0.03, 60), (0.05, 20)], [INITIALIZATION])
    computed = bounds.upper_bound.cache_info().misses
    for _ in range(25):
        assert noise_multiplier_for(2.0, DELTA, [(0.05, 20), (0.03, 30), (0.03, 30)], [INITIALIZATION]) == first
    assert bounds.upper_bound.cache_info().misses == computed


def test_a_target_that_cannot_be_reached_is_refused():
    with pytest.raises(UserError, match="is spent already"):
        noise_multiplier_for(1.0, DELTA, [(0.01, 10)], [Mechanism(1.0, 1.0, 1)])
    with pytest.raises(UserError, match=r"cannot be reached with accountant rdp.* or use prv"):
        noise_multiplier_for(1e-3, DELTA, [(1.0, 1)], accountant="rdp")
    with pytest.raises(UserError, match="Expected 0 < epsilon"):
        noise_multiplier_for(0.0, DELTA, [(0.01, 10)])
    with pytest.raises(ValueError, match="at least one planned step"):
        noise_multiplier_for(1.0, DELTA, [(0.01, 0)])


# ---- delta


@given(st.integers(1, 10**9))
def test_the_default_delta_is_below_one_over_n(num_examples):
    check_delta(default_delta(num_examples), num_examples)


@pytest.mark.parametrize(("delta", "num_examples"), [(0.01, 100), (0.02, 100), (1.0, 1), (0.0, 10), (-1e-5, 10), (math.nan, 10)])
def test_a_delta_of_one_over_n_or_more_is_refused(delta, num_examples):
    with pytest.raises(UserError, match="Expected 0 < delta < 1/n"):
        check_delta(delta, num_examples)


def test_the_default_delta_is_n_to_the_minus_1_1_and_needs_examples():
    assert default_delta(1000) == pytest.approx(1000**-1.1)
    with pytest.raises(ValueError, match="at least one example"):
        default_delta(0)


# ---- client level


@pytest.mark.parametrize(("noise", "count_noise"), [(1.0, 10.0), (2.0, 1.5), (0.5, 0.26)])
def test_update_and_count_together_cost_what_the_undivided_noise_costs(noise, count_noise):
    update_noise = split_noise(noise, count_noise)
    assert update_noise > noise
    together = pld_epsilon(((update_noise, 1.0, 1), (count_noise / 0.5, 1.0, 1)), DELTA)
    assert together == pytest.approx(gaussian_epsilon(noise, 1, DELTA), rel=1e-3)


def test_count_noise_of_at_most_half_the_noise_multiplier_is_refused():
    assert split_noise(0.0, 0.0) == 0
    for count_noise in (0.5, 0.1, 0.0, -10.0):
        with pytest.raises(UserError, match="count_noise > noise_multiplier / 2"):
            split_noise(1.0, count_noise)

"""Bounds of the quantizer, its exact sums, and its width on the wire."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedsim.core.quantization import COUNTER_BITS, Quantizer, limit_of, residues, smallest_width
from fedsim.errors import UserError

VALUES = arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(-3, 3))


def quantizer_of(bits, clients, range_=1.0):
    return Quantizer(range_, limit_of(bits), clients, smallest_width(clients, limit_of(bits)))


@given(VALUES, st.integers(2, 24), st.floats(1e-3, 1), st.integers(0, 99))
@settings(max_examples=80)
def test_a_rounded_value_is_within_one_step_and_clipped_values_are_counted(values, bits, weight, seed):
    quantizer = quantizer_of(bits, 2, range_=1.5)
    integers, clipped = quantizer.rounded(values, weight, np.random.default_rng(seed))
    exact = np.clip(values, -1.5, 1.5) * weight / quantizer.step
    assert np.all(np.abs(integers - exact) < 1 + 1e-6)
    assert np.all(np.abs(integers) <= quantizer.limit)
    assert clipped == sum(abs(value) > 1.5 for value in values)


def test_rounding_is_unbiased_and_determined_by_the_generator():
    quantizer, values = quantizer_of(4, 2), np.full(40_000, 0.3)
    integers, _ = quantizer.rounded(values, 1.0, np.random.default_rng(0))
    assert set(integers) == {2, 3}
    assert integers.mean() * quantizer.step == pytest.approx(0.3, abs=4 * quantizer.step * 0.5 / 200)
    assert np.array_equal(integers, quantizer.rounded(values, 1.0, np.random.default_rng(0))[0])


@given(st.integers(2, 20), st.integers(2, 40), st.data())
@settings(max_examples=60)
def test_a_sum_over_the_wire_is_exact_even_when_all_values_are_at_the_limit(bits, clients, data):
    quantizer = quantizer_of(bits, clients)
    signs = data.draw(st.sampled_from([-1, 1]))
    vectors = [
        np.array([signs * quantizer.limit, -quantizer.limit, 0, data.draw(st.integers(-quantizer.limit, quantizer.limit))])
        for _ in range(clients)
    ]
    total = np.zeros(4, dtype=np.uint32)
    for vector in vectors:
        sent = quantizer.to_wire(residues(vector))
        assert sent.shape == (4, quantizer.width)
        total += quantizer.from_wire(sent)
    assert np.array_equal(quantizer.signed(total), sum(vectors))


@given(st.integers(2, 20), st.lists(st.integers(0, (1 << COUNTER_BITS) - 1), min_size=2, max_size=9))
@settings(max_examples=60)
def test_counters_are_summed_exactly_as_digits_of_the_grid(bits, counts):
    quantizer = quantizer_of(bits, len(counts))
    digits = [quantizer.counter(count) for count in counts]
    assert all(len(each) == quantizer.digits and each.max() <= quantizer.limit for each in digits)
    assert quantizer.counted(sum(digits)) == sum(counts)


@pytest.mark.parametrize(("bits", "clients", "width"), [(8, 2, 2), (16, 2, 3), (16, 255, 3), (16, 300, 4), (4, 10, 1)])
def test_a_sum_takes_the_fewest_whole_bytes_that_hold_it(bits, clients, width):
    assert quantizer_of(bits, clients).width == width
    assert 2 * clients * limit_of(bits) < 256**width
    assert width == 1 or 2 * clients * limit_of(bits) >= 256 ** (width - 1)


def test_a_sum_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"secure.bits: the sum of 600 clients"):
        quantizer_of(24, 600)

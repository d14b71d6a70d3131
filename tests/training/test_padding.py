"""Padded widths of passes: how much is added, and how few distinct numbers of tokens remain."""

from hypothesis import given
from hypothesis import strategies as st

from fedsim.training.padding import TOKEN_STEP, WIDTH_STEP, padded_width


@given(rows=st.integers(1, 300), longest=st.integers(1, 4096))
def test_a_row_is_never_cut_and_is_padded_by_less_than_a_step(rows, longest):
    assert longest <= padded_width(rows, longest) < longest + WIDTH_STEP


@given(rows=st.integers(1, 300), longest=st.integers(1, 4096))
def test_no_smaller_width_gives_a_multiple_of_the_token_step(rows, longest):
    width = padded_width(rows, longest)
    fitting = (w for w in range(longest, width) if rows * w % TOKEN_STEP == 0)
    assert next(fitting, None) is None


@given(rows=st.integers(1, 75).map(lambda quarter: 4 * quarter), longest=st.integers(1, 512))
def test_passes_of_micro_batches_of_four_have_a_multiple_of_the_token_step(rows, longest):
    assert rows * padded_width(rows, longest) % TOKEN_STEP == 0


def test_a_width_that_is_already_a_multiple_is_unchanged():
    assert {padded_width(rows, 64) for rows in range(1, 100)} == {64}

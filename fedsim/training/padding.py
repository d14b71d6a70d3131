"""How wide the rows of a pass are padded: to few numbers of tokens, because each number has kernels of its own.

oneDNN compiles a product for every number of tokens that it meets (a millisecond, and half a megabyte that stays), and the tensor cores of
a GPU like multiples of eight.
"""

from math import gcd

WIDTH_STEP = 8
"""No row gets more than one position less than this beyond the longest one."""

TOKEN_STEP = 32
"""A pass has a multiple of so many tokens, as far as WIDTH_STEP allows it."""


def padded_width(rows: int, longest: int) -> int:
    """Returns the width of `rows` rows of which the longest has `longest` tokens."""
    step = min(WIDTH_STEP, TOKEN_STEP // gcd(rows, TOKEN_STEP))
    return -(-longest // step) * step

"""The width to which the rows of a pass are padded: one of a few, because each number of tokens has kernels of its own.

oneDNN compiles a product for every number of tokens that it meets (a millisecond, and half a megabyte as long as it is kept), and the
tensor cores of a GPU like multiples of eight.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Whole = TypeVar("Whole", int, NDArray[np.int64])

WIDTH_STEP = 8
"""A row gets fewer than this many positions beyond the longest one."""

TOKEN_STEP = 32
"""A pass has a multiple of this many tokens, as far as WIDTH_STEP allows."""


def padded_width(rows: Whole, longest: Whole) -> Whole:
    """Returns the width of `rows` rows of which the longest has `longest` tokens: of one pass, or of several at once."""
    step = np.minimum(WIDTH_STEP, TOKEN_STEP // np.gcd(rows, TOKEN_STEP))
    width: Whole = -(-longest // step) * step
    return width

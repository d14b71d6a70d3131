"""Pads the rows of a pass to one of a few widths, because each number of tokens needs its own kernels.

oneDNN compiles a product for every new number of tokens (a millisecond, and half a megabyte while cached), and the
tensor cores of a GPU prefer multiples of eight.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Whole = TypeVar("Whole", int, NDArray[np.int64])

WIDTH_STEP = 8
"""A row gets fewer than this many positions beyond the longest row."""

TOKEN_STEP = 32
"""The tokens of a pass are a multiple of this, as far as WIDTH_STEP allows."""


def padded_width(rows: Whole, longest: Whole) -> Whole:
    """Returns the width of `rows` rows, the longest of `longest` tokens, for one pass or an array of passes."""
    step = np.minimum(WIDTH_STEP, TOKEN_STEP // np.gcd(rows, TOKEN_STEP))
    width: Whole = -(-longest // step) * step
    return width

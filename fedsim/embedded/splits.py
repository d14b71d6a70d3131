"""Draws the questions of a split; a hash of the question decides its split, never a seed."""

import hashlib
from collections.abc import Callable

import numpy as np

from fedsim.types import Example

TEST_SHARE = 0.2
"""Share of all question keys that belong to the test split."""

_PATIENCE = 2000
"""Consecutive draws without a new question after which the questions count as exhausted."""


def split_of(key: str) -> str:
    """Returns "test" for a fixed fifth of all keys, "train" for the others."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


def draw_unique(make: Callable[[np.random.Generator], tuple[str, Example] | None], count: int, rng: np.random.Generator) -> list[Example]:
    """Returns the first `count` examples with different keys that `make` returns, fewer if it keeps repeating itself."""
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < count and misses < _PATIENCE:
        made = make(rng)
        if made is None or made[0] in found:
            misses += 1
            continue
        misses = 0
        found[made[0]] = made[1]
    return list(found.values())

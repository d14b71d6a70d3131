"""What makes a method: which factors train and travel, how the server combines them, and whether the data is pooled."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One federated method. `aggregate` takes (weight, flat update) pairs as they arrive and returns the new flat global factors."""

    name: str
    summary: str
    trained: tuple[str, ...]  # kinds of factors ("R") that train at a client and travel both ways
    aggregate: Callable[[Iterable[tuple[float, Tensor]]], Tensor]
    pooled: bool = False  # one party holds all data and nothing travels

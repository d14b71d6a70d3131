"""Canaries: training examples of random tokens that an audit puts into clients' data, each by an independent fair coin.

Random tokens are unpredictable, so their gradients are large and unlike each other: each canary moves its client's update
in its own direction, so one can be detected without interference from the others.
"""

from dataclasses import dataclass

import numpy as np

from fedsim.seeding import numpy_generator
from fedsim.types import EncodedExample

NUM_TOKENS = 8  # only the last carries the loss: gradients of more targets have more in common


@dataclass(frozen=True)
class Canary:
    """An example that is in its client's data if `inside`."""

    example: EncodedExample
    client: int
    inside: bool


def canaries(count: int, clients: int, vocabulary: list[int], seed: int) -> list[Canary]:
    """Returns the canaries of a run, dealt to the clients in turn.

    Guarantees: the coins are fair, and independent of each other and of all other randomness in a run.
    """
    tokens = numpy_generator(seed, "canaries").choice(vocabulary, (count, NUM_TOKENS))
    coins = numpy_generator(seed, "canary coins").random(count) < 0.5
    return [
        Canary(EncodedExample(row, NUM_TOKENS - 1), place % clients, inside)
        for place, (row, inside) in enumerate(zip(tokens.astype(np.int32), coins.tolist(), strict=True))
    ]

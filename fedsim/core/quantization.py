"""Quantizes numbers to integers that can be masked and summed, by stochastic rounding, and gives the size of their sums.

For a client's value x with weight w in (0, 1], w x / step is rounded up or down at random without bias; integers lie between -limit and
limit. Sums are taken modulo 256^width, which exceeds twice the largest sum, so they are recovered exactly: the error of a weighted mean is
below clients * step / (sum of the weights), and that of a plain mean below one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from fedsim.choices import PrivacyUnit
from fedsim.config import Config
from fedsim.errors import UserError

Integers = NDArray[np.uint32]
"""Residues modulo 2^32; entries are sent modulo 256^width, which commutes with sums of residues."""

COUNTER_BITS = 48
"""Size of a counter, such as that of clipped entries, which is sent in the same sum as digits of the quantizer."""

LOSS_UNITS = 1 << 16
"""Parts of one in which a loss is counted."""


@dataclass(frozen=True)
class Quantizer:
    """Multiples of `step` from -limit to limit, for the sum of `clients` vectors modulo 256^width."""

    range: float
    limit: int
    clients: int
    width: int  # bytes that an entry takes on the wire

    def __post_init__(self) -> None:
        if self.limit < 1 or not self.range > 0 or self.width not in (1, 2, 3, 4):
            raise ValueError(f"Expected limit >= 1, range > 0 and a width of 1 to 4 bytes, got {self}.")
        if 2 * self.clients * self.limit >= 1 << (8 * self.width):
            raise UserError(
                f"secure.bits: the sum of {self.clients} clients with entries up to {self.limit} does not fit into {8 * self.width} bits; "
                "use fewer bits."
            )

    @property
    def step(self) -> float:
        """Distance between neighbouring multiples."""
        return self.range / self.limit

    @property
    def digits(self) -> int:
        """Entries that a counter takes."""
        return ceil(COUNTER_BITS * log(2) / log(self.limit + 1))

    def rounded(self, values: NDArray[np.float64], weight: float, generator: np.random.Generator) -> tuple[NDArray[np.int64], int]:
        """Returns integers whose expectation is weight * clipped values / step, and how many values were clipped to the range.

        Guarantees: each differs from that by less than one. Raises ValueError unless 0 < weight <= 1.
        """
        if not 0 < weight <= 1:
            raise ValueError(f"Expected a weight above 0 and at most 1, got {weight}.")
        clipped = int(np.count_nonzero(np.abs(values) > self.range))
        exact = np.clip(values, -self.range, self.range) * (weight / self.step)
        return np.clip(round_at_random(exact, generator), -self.limit, self.limit), clipped

    def counter(self, count: float) -> NDArray[np.int64]:
        """Returns a count, clipped to 0 .. 2^COUNTER_BITS - 1, as digits whose sum over clients is exact."""
        left, digits = min(max(0, round(count)), (1 << COUNTER_BITS) - 1), []
        for _ in range(self.digits):
            left, digit = divmod(left, self.limit + 1)
            digits.append(digit)
        return np.array(digits, dtype=np.int64)

    def counted(self, digits: Sequence[int] | NDArray[np.int64]) -> int:
        """Returns the sum of counters from the sum of their digits."""
        return sum(int(digit) * (self.limit + 1) ** place for place, digit in enumerate(digits))

    def signed(self, total: Integers) -> NDArray[np.int64]:
        """Returns the sum from its residues."""
        bits = 8 * self.width
        low = total.astype(np.int64) & ((1 << bits) - 1)
        return np.where(low >> (bits - 1), low - (1 << bits), low)

    def to_wire(self, integers: Integers) -> NDArray[np.uint8]:
        """Returns [entries, width] bytes, little-endian."""
        return np.ascontiguousarray(integers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : self.width])

    def from_wire(self, data: NDArray[np.uint8]) -> Integers:
        """Returns the residues, modulo 256^width, from the bytes of `to_wire`."""
        whole = np.zeros((len(data), 4), dtype=np.uint8)
        whole[:, : self.width] = data
        return whole.reshape(-1).view("<u4").astype(np.uint32)


def limit_of(bits: int) -> int:
    """Returns the largest integer of a signed grid of `bits` bits."""
    return (1 << (bits - 1)) - 1


def smallest_width(clients: int, limit: int) -> int:
    """Returns the least bytes that hold a sum of `clients` entries up to `limit`, at most 4."""
    return next((width for width in (1, 2, 3) if 2 * clients * limit < 1 << (8 * width)), 4)


def residues(integers: NDArray[np.int64]) -> Integers:
    """Returns integers modulo 2^32."""
    return (integers & 0xFFFFFFFF).astype(np.uint32)


def round_at_random(exact: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns each number rounded up with the probability of its fraction, else down."""
    return np.floor(exact + generator.random(exact.shape)).astype(np.int64)


def upload_quantizer(config: Config, clients: int, clip_norm: float | None = None) -> Quantizer:
    """Returns the quantizer of uploads in a round of `clients`; with client-level noise its range is `clip_norm`, with room for noise."""
    limit = limit_of(config.secure.bits)
    if config.privacy.unit is PrivacyUnit.client:
        return Quantizer(clip_norm or config.privacy.clip_norm, limit, clients, 4)
    return Quantizer(config.secure.range, limit, clients, smallest_width(clients, limit))


def gradient_quantizer(range: float, clients: int) -> Quantizer:
    """Returns the quantizer of initial gradients, as fine as 32 bits allow."""
    return Quantizer(range, ((1 << 31) - 1) // clients, clients, 4)


def num_counters(config: Config) -> int:
    """Returns how many counters an upload carries: clipped entries, tokens, loss; none if everything a client sends needs noise."""
    return 0 if config.privacy.unit is PrivacyUnit.client else 3

"""Shamir's secret sharing (CACM 1979): any `threshold` shares give a 32-byte secret, fewer reveal nothing of it.

A share is a value of a random polynomial over the integers modulo the first prime above 2^256, so a secret need not be split into pieces;
holders are points from 1 on. Flower's own sharing works in pieces of 16 bytes over GF(2^128) and takes a hundred times as long.
"""

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Returns one share of SHARE_BYTES for each point. Raises ValueError for a wrong secret, threshold or points."""
    if len(secret) != SECRET_BYTES or len(set(points)) != len(points) or min(points, default=0) < 1:
        raise ValueError(f"Expected {SECRET_BYTES} bytes and different points from 1 on, got {len(secret)} bytes and {list(points)[:5]}.")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"Expected a threshold from 1 to the {len(points)} shares, got {threshold}.")
    coefficients = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES, "little") for point in points}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Returns the secret from shares by point. Raises ValueError for fewer than the threshold, or a result above 32 bytes.

    Other wrong shares give a wrong secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"Expected at least {threshold} shares, got {len(shares)}.")
    chosen = {point: int.from_bytes(shares[point], "little") for point in sorted(shares)[:threshold]}
    total = 0
    for point, value in chosen.items():  # Lagrange's interpolation at zero
        above, below = 1, 1
        for other in chosen:
            if other != point:
                above, below = above * other % PRIME, below * (other - point) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    if total >= 1 << (8 * SECRET_BYTES):
        raise ValueError("Expected shares of one secret, got some that do not fit together.")
    return total.to_bytes(SECRET_BYTES, "little")


def _value(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value

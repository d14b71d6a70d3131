"""Any threshold of the shares recovers the secret; fewer reveal nothing."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.secret_sharing import PRIME, SHARE_BYTES, combine, split


@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.integers(0, 8), st.randoms())
@settings(max_examples=60)
def test_any_threshold_of_the_shares_recovers_the_secret(secret, threshold, more, random):
    shares = split(secret, threshold, random.sample(range(1, 1000), threshold + more))
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    chosen = random.sample(sorted(shares), threshold)
    assert combine({point: shares[point] for point in chosen}, threshold) == secret


def test_fewer_shares_than_the_threshold_are_refused_and_fit_every_secret():
    shares = split(bytes(32), 3, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="at least 3 shares, got 2"):
        combine({1: shares[1], 2: shares[2]}, 3)
    other = secrets.token_bytes(32)  # with a made-up third share, two shares open to any secret
    a, b = (int.from_bytes(shares[point], "little") for point in (1, 2))
    made_up = (int.from_bytes(other, "little") - 3 * a + 3 * b) % PRIME  # p(0) = 3 p(1) - 3 p(2) + p(3)
    assert combine({1: shares[1], 2: shares[2], 3: made_up.to_bytes(SHARE_BYTES, "little")}, 3) == other


def test_shares_of_the_same_secret_differ_each_time():
    secret = secrets.token_bytes(32)
    first, second = split(secret, 2, [1, 2]), split(secret, 2, [1, 2])
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("secret", "threshold", "points"), [(b"x", 1, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 1, [0]), (bytes(32), 1, [1, 1])]
)
def test_invalid_secrets_thresholds_and_points_are_refused(secret, threshold, points):
    with pytest.raises(ValueError, match="Expected"):
        split(secret, threshold, points)

import numpy as np
import pytest
import torch

from fedsim.errors import UserError
from fedsim.seeding import NoiseKey

KEY = NoiseKey(bytes(range(32)))


def words_of(generator, count):
    """Draws 32-bit words of a torch generator: an integer below 2^31 takes two words and keeps the second."""
    return torch.randint(0, 2**31, (count,), generator=generator).numpy()


def test_a_torch_stream_is_numpys_mersenne_twister_seeded_with_all_256_bits():
    entropy = int.from_bytes(KEY.under("noise", 3, 7).key, "big")
    expected = np.random.MT19937(np.random.SeedSequence(entropy, pool_size=8)).random_raw(4000)[1::2] % 2**31
    assert (words_of(KEY.torch("noise", 3, 7), 2000) == expected.astype(np.int64)).all()


def test_normal_numbers_of_a_torch_stream_are_standard_normal_and_repeat():
    drawn = torch.randn(200_000, generator=KEY.torch("noise"))
    assert (abs(float(drawn.mean())), float(drawn.std())) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    assert torch.equal(drawn, torch.randn(200_000, generator=KEY.torch("noise")))


def test_two_clients_whose_seeds_agree_in_32_bits_share_no_stream():
    """(seed 0, round 10, client 503) and (20, 362) shared one when torch's generator took an integer seed."""
    one, other = (torch.randn(64, generator=NoiseKey.of_seed(0).torch("noise", *each)) for each in ((10, 503), (20, 362)))
    assert not torch.equal(one, other)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.5


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_no_two_of_many_streams_start_with_the_same_number(kind):
    def first(*purpose):
        generator = getattr(KEY, kind)(*purpose)
        return generator.random() if kind == "numpy" else float(torch.rand((), generator=generator, dtype=torch.float64))

    assert len({first("noise", round, client) for round in range(20) for client in range(100)}) == 2000


def test_streams_differ_for_words_and_their_parts_and_for_keys_and_their_bits():
    streams = [KEY.under("a", "b"), KEY.under("ab"), KEY.under("a/b"), KEY.under("a", "b", ""), NoiseKey(bytes(32)).under("a", "b")]
    assert len({each.key for each in streams}) == len(streams)


def test_a_key_file_is_made_once_for_its_owner_only_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "noise.key"
    first = NoiseKey.kept_in(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert NoiseKey.kept_in(path) == first != NoiseKey.kept_in(tmp_path / "other.key")
    assert first.key.hex() not in repr(first)
    path.write_text("half a k")
    with pytest.raises(UserError, match="expected a noise key of 64 hexadecimal digits"):
        NoiseKey.kept_in(path)

"""Explicit randomness: every stream is derived from the run's seed and its purpose, never from global state.

The same (seed, purpose) gives the same stream on every machine and in every process, so a result does not depend on how clients are packed
into cohorts, in which order they are trained, or where a run was interrupted. The randomness of differential privacy is derived from a key
in the same way; a secret key hides it from anyone who knows the seed.
"""

import hashlib
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedsim.errors import UserError
from fedsim.files import atomic_write

KEY_BYTES = 32


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed from SHA-256 over `seed` and the words of `purpose`, for example (0, "batches", round, client)."""
    text = "/".join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Returns a NumPy generator of the stream (seed, purpose)."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a CPU torch generator of the stream (seed, purpose)."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@dataclass(frozen=True, repr=False)
class NoiseKey:
    """A 256-bit key for the noise and coins of differential privacy: the same words give the same stream.

    Streams have the entropy of the key. A seed of torch's own generator is unsuitable: on the CPU only its low 32 bits count, so that
    streams can be searched, and some would repeat in a long run.
    """

    key: bytes

    @classmethod
    def of_seed(cls, seed: int) -> "NoiseKey":
        """Returns the key of a repeatable run: anyone who knows the seed can remove the noise."""
        return cls(hashlib.sha256(f"noise/{seed}".encode()).digest())

    @classmethod
    def secret(cls) -> "NoiseKey":
        """Returns a random key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def kept_in(cls, path: Path) -> "NoiseKey":
        """Returns the secret key in a file, created with mode 0600 if missing. Raises UserError for a damaged file."""
        if not path.exists():
            atomic_write(path, cls.secret().key.hex().encode(), mode=0o600)
        try:
            key = bytes.fromhex(path.read_text())
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise UserError(
                f"{path}: expected a noise key of {2 * KEY_BYTES} hexadecimal digits, got something else. Restore or remove it."
            )
        return cls(key)

    def under(self, *words: str | int | bytes) -> "NoiseKey":
        """Returns the key derived for `words`; keys of different words are unrelated, even if an adversary chose the words."""
        hashed = hashlib.blake2b(key=self.key, digest_size=KEY_BYTES)
        for word in words:
            content = word if isinstance(word, bytes) else str(word).encode()
            hashed.update(struct.pack("<Q", len(content)) + content)
        return NoiseKey(hashed.digest())

    def numpy(self, *purpose: str | int) -> np.random.Generator:
        """Returns a NumPy generator of the stream (key, purpose)."""
        return np.random.Generator(np.random.PCG64(self._entropy(*purpose)))

    def torch(self, *purpose: str | int) -> torch.Generator:
        """Returns a CPU torch generator of the stream (key, purpose): a Mersenne Twister whose full state NumPy seeds."""
        state = np.random.MT19937(self._entropy(*purpose)).state["state"]
        head = struct.pack("<QiiQ", 0, len(state["key"]) - state["pos"] + 1, 1, state["pos"])  # seed, left, seeded, next
        tail = bytes(24 + 8 + 8)  # no cached normal deviate
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray(head + state["key"].astype("<u8").tobytes() + tail), dtype=torch.uint8))
        return generator

    def _entropy(self, *purpose: str | int) -> np.random.SeedSequence:
        return np.random.SeedSequence(int.from_bytes(self.under(*purpose).key, "big"), pool_size=KEY_BYTES // 4)

"""Randomness is an argument: every stream is derived from the run's seed and what it is for, never from a global state.

The same (seed, purpose) gives the same stream on every machine and in every process, so a result does not depend on
how clients are packed into cohorts, in which order they are trained, or where a run was interrupted.
"""

import hashlib

import numpy as np
import torch


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

"""Caches the tokens of a run's training examples in a file, for all its processes and for later runs.

A file holds the tokens of one pool of examples, is named by the SHA-256 of everything that determines them, and is mapped into memory, so
that workers on one machine share its pages. Damage to a file or the folder never changes the tokens: they are then made by the tokenizer. A
file is replaced, never modified, and may be deleted at any time; only writing into it affects, or crashes, processes that have it mapped.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.files import atomic_write, cache_folder
from fedsim.training.flat_tokens import flattened, unflattened
from fedsim.types import AnyEncoded, AnyExample, Labelled, Tokens

LEAST_CHARACTERS = 4_000_000
"""Size of the smallest cached pool: tokenising less takes about a second, which is not worth a file in the user's home."""

UNUSED_DAYS = 30
"""Files unused for this long are deleted when a new one is written, so that the folder does not grow without bound."""

VERSION = 1
"""Version of the encoding of examples and of the file format; raise it when either changes, to invalidate all cached tokens."""

CHECK = 8
"""Leading entries of a file, which hold the SHA-256 of its name and of all following entries."""


def kept(
    pool: Sequence[AnyExample], tokenizer: Any, how: Sequence[object], encode: Callable[[Sequence[AnyExample]], list[AnyEncoded]]
) -> list[AnyEncoded] | None:
    """Returns `encode(pool)`, from a file if there is one; `how` is everything besides pool and tokenizer that determines the tokens.

    Guarantees: bit for bit what `encode` returns. A damaged or foreign file is recreated. Returns None, without encoding, if a file is not
    worthwhile or possible: the pool is small, the tokenizer is code, or the folder is not writable.
    """
    texts = [text for example in pool for text in _texts(example)]
    rules = rules_of(tokenizer) if sum(map(len, texts)) >= LEAST_CHARACTERS else None
    folder = _writable_folder() if rules else None
    if rules is None or folder is None:
        return None
    versions = [version(package) for package in ("tokenizers", "transformers")]
    path = folder / f"{_digest((rules, json.dumps([VERSION, *versions, *how]), *texts)).hex()}.npy"
    flat = _read(path)
    if flat is None:
        encoded = encode(pool)
        flat = _written(path, flattened(encoded))
        if flat is None:
            return encoded
    return unflattened(flat)


def _texts(example: AnyExample) -> tuple[str, ...]:
    """Returns the parts of an example that determine its tokens and its label."""
    if isinstance(example, Labelled):
        return example.premise, example.hypothesis or "", str(example.labels.index(example.answer))
    return example.prompt, example.response, json.dumps(example.turns) if example.turns else ""


def rules_of(tokenizer: Any) -> str | None:
    """Returns all data that determines a tokenizer's output, wherever it was loaded from; None if the tokenizer is code."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both persist from the last call, and the next call sets them again
    backend.no_padding()
    names = (
        "model_max_length",
        "truncation_side",
        "split_special_tokens",
        "model_input_names",
        "eos_token_id",
        "sep_token_id",
        "chat_template",
    )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # a chat template may name them
    facts = [type(tokenizer).__name__, *(getattr(tokenizer, name) for name in names), special]
    return json.dumps(facts) + backend.to_str()


def _digest(parts: Iterable[str | memoryview]) -> bytes:
    """Returns the SHA-256 of a sequence of texts or buffers; their lengths are hashed too, so that different sequences differ."""
    hashed = sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.digest()


def _writable_folder() -> Path | None:
    """Returns the cache folder, created if needed; None if it is not writable."""
    try:
        folder = cache_folder() / "tokens"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _read(path: Path) -> Tokens | None:
    """Returns the tokens in a file, mapped into memory; None if the file is missing or does not match its checksum."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError):
        return None
    if array.dtype != np.int32 or array.ndim != 1 or len(array) < CHECK or array[:CHECK].tobytes() != _checksum(path, array[CHECK:]):
        return None
    with suppress(OSError):
        os.utime(path)
    return np.asarray(array)[CHECK:]


def _checksum(path: Path, flat: Tokens) -> bytes:
    return _digest((path.name, flat.view(np.uint8).data))


def _written(path: Path, flat: Tokens) -> Tokens | None:
    """Writes the tokens and returns them mapped from the file, as other processes read them; None if they cannot be written."""
    head = BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(flat.dtype), "fortran_order": False, "shape": (CHECK + len(flat),)}
    np.lib.format.write_array_header_1_0(head, facts)
    try:
        atomic_write(path, head.getbuffer(), _checksum(path, flat), flat.data, mode=0o600)
        _remove_unused(path.parent)
    except OSError:
        return None
    return _read(path)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            if path.stat().st_mtime < oldest:
                path.unlink()

"""The tokens of a run's training examples, made once and kept in a file for all processes and later runs.

A file holds the tokens of one pool of examples, is named by the SHA-256 of all that decides them, and is mapped into memory: workers on one
machine share its pages. Whatever is wrong with a file or with the folder, the tokens are those that the tokenizer makes. A file is
replaced, never changed, and may be deleted at any time; only who writes into one changes, or ends, the processes that have it mapped.
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
"""Text of the smallest pool that is kept: tokenising less takes a process about a second, which is not worth a file in somebody's home."""

UNUSED_DAYS = 30
"""Files that no run has used for so long go when a new one is written, so that the folder does not grow for ever."""

VERSION = 1
"""Of the way that examples are encoded and of the files: raise it with either, since it makes all kept tokens worthless."""

CHECK = 8
"""Entries of a file that hold the SHA-256 of its name and of all that follows."""


def kept(
    pool: Sequence[AnyExample], tokenizer: Any, how: Sequence[object], encode: Callable[[Sequence[AnyExample]], list[AnyEncoded]]
) -> list[AnyEncoded] | None:
    """Returns `encode(pool)`, from a file if there is one; `how` is all that decides the tokens besides pool and tokenizer.

    Guarantees: bit for bit what `encode` returns. A file that is damaged or another's is made anew. None, with nothing encoded, where a
    file would not pay or nothing can be kept: the pool is small, the tokenizer is code, or the folder cannot be written.
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
    """Returns all of an example that decides its tokens and its label."""
    if isinstance(example, Labelled):
        return example.premise, example.hypothesis or "", str(example.labels.index(example.answer))
    return example.prompt, example.response, json.dumps(example.turns) if example.turns else ""


def rules_of(tokenizer: Any) -> str | None:
    """Returns all the data that decides what a tokenizer makes of a text, wherever it was loaded from; None where that is code."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # both are left over from the last call, and set anew in the next
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
    """Returns the SHA-256 of a sequence of texts or buffers; no other sequence has it."""
    hashed = sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.digest()


def _writable_folder() -> Path | None:
    """Returns the folder of the files, made if need be; None where it cannot be written."""
    try:
        folder = cache_folder() / "tokens"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _read(path: Path) -> Tokens | None:
    """Returns the tokens in a file, mapped into memory; None where there is none, or not the one that was written."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError):
        return None
    if array.dtype != np.int32 or array.ndim != 1 or len(array) < CHECK or array[:CHECK].tobytes() != _check(path, array[CHECK:]):
        return None
    with suppress(OSError):
        os.utime(path)
    return np.asarray(array)[CHECK:]


def _check(path: Path, flat: Tokens) -> bytes:
    return _digest((path.name, flat.view(np.uint8).data))


def _written(path: Path, flat: Tokens) -> Tokens | None:
    """Writes the tokens and returns them as another process will find them; None where they cannot be written."""
    head = BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(flat.dtype), "fortran_order": False, "shape": (CHECK + len(flat),)}
    np.lib.format.write_array_header_1_0(head, facts)
    try:
        atomic_write(path, head.getbuffer(), _check(path, flat), flat.data, mode=0o600)
        _remove_unused(path.parent)
    except OSError:
        return None
    return _read(path)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(OSError):  # another process has been faster
            if path.stat().st_mtime < oldest:
                path.unlink()

"""Checkpoints: one file holds the tensors of a round and their state, so that a single rename publishes both.

Tensors that rarely change between rounds (the bases) are written only when they change, to two identical files next to the checkpoints, so
that one damaged file never spoils more than one checkpoint. All are ordinary safetensors files; their metadata holds the state as JSON and
a SHA-256 over the whole content.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.files import atomic_write, sync_folder

ROUNDS, BASES = "round_*.safetensors", "bases_*.safetensors"
COPIES = 2
UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that a damaged or missing file may raise, besides SafetensorError. A disk that cannot be read does not count as damage."""


@dataclass(frozen=True)
class Bases:
    """The names of the tensors that rarely change between rounds, and a digest that identifies their current values."""

    names: frozenset[str] = frozenset()
    digest: str = ""


NO_BASES = Bases()


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `round`."""

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    bases: Bases = NO_BASES


class DamagedError(Exception):
    """The file is not an intact checkpoint."""


class Store:
    """Writes the checkpoints of a run into a folder and keeps the latest `keep`.

    The first one always writes the bases, because copies of an earlier store may be damaged.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._written = NO_BASES

    def writing(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Copies the checkpoint and returns a function that writes it; another thread may call it, before the next checkpoint.

        The function writes folder/round_0003.safetensors atomically, after new bases, then removes files that no kept round needs. The
        state must be JSON: it is read back with text keys and lists. Floats and tensors of all types are restored bit for bit.
        """
        bases, new = checkpoint.bases, checkpoint.bases != self._written
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if new or name not in bases.names}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        state = json.dumps(checkpoint.state)

        def write() -> None:
            first = not self._folder.exists()
            self._folder.mkdir(exist_ok=True)
            if first:
                sync_folder(self._folder.parent)  # makes the names of this folder and of the logs durable
            if new and bases.names:
                content = _encoded({name: tensors.pop(name) for name in bases.names}, {"bases": bases.digest})
                for path in _copies(self._folder, bases.digest):
                    atomic_write(path, content)
            self._written = bases
            metadata = {"round": str(checkpoint.round), "state": state, "bases": bases.digest}
            atomic_write(self._folder / f"round_{checkpoint.round:04d}.safetensors", _encoded(tensors, metadata))
            self._remove_old(bases.digest)

        return write

    def _remove_old(self, digest: str) -> None:
        for old in saved(self._folder)[: -self._keep]:
            old.unlink()
        others = set(self._folder.glob(BASES)) - set(_copies(self._folder, digest))
        if others:
            needed = {copy for path in saved(self._folder) for copy in _copies(self._folder, _bases_needed(path))}
            for path in others - needed:
                path.unlink()


def saved(folder: Path) -> list[Path]:
    """Returns the checkpoint paths in the order of their rounds."""
    return sorted(folder.glob(ROUNDS), key=lambda path: int(path.stem.removeprefix("round_")))


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`, on the CPU. Raises DamagedError if a bit of it, or of every copy of its bases, is wrong."""
    tensors, metadata = _decoded(path)
    try:
        round_, state, digest = int(metadata["round"]), json.loads(metadata["state"]), metadata.get("bases", "")
    except (ValueError, KeyError) as error:
        raise DamagedError(f"{path.name} cannot be read ({type(error).__name__})") from error
    bases = _bases(path.parent, digest) if digest else {}
    return Checkpoint(round_, tensors | bases, state, Bases(frozenset(bases), digest))


def _bases(folder: Path, digest: str) -> dict[str, Tensor]:
    """Returns the bases with this digest from the first intact copy. Raises OSError or DamagedError if there is none."""
    reasons: list[OSError | DamagedError] = []
    for path in _copies(folder, digest):
        try:
            tensors, metadata = _decoded(path)
        except (OSError, DamagedError) as error:
            reasons.append(error)
            continue
        if metadata.get("bases") == digest:
            return tensors
        reasons.append(DamagedError(f"{path.name} holds others"))
    for reason in reasons:
        if isinstance(reason, OSError):
            raise reason
    raise DamagedError("; ".join(map(str, reasons)))


def _bases_needed(path: Path) -> str:
    """Returns the digest of the bases that a checkpoint refers to, "" if there are none or its header is damaged."""
    try:
        with open(path, "rb") as file:
            size = file.read(8)
            return str(_metadata(size + file.read(int.from_bytes(size, "little"))).get("bases", ""))
    except (OverflowError, MemoryError, *UNREADABLE):
        return ""


def _copies(folder: Path, digest: str) -> list[Path]:
    return [folder / f"bases_{digest[:16]}_{number}.safetensors" for number in range(1, COPIES + 1)]


def _encoded(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save as serialized

    return serialized(tensors, metadata | {"sha256": _digest(tensors, metadata)})


def _decoded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a file. Raises DamagedError if the file is missing or a single bit of it is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    try:
        content = path.read_bytes()
        metadata, tensors = _metadata(content), tensors_of(content)
        intact = metadata["sha256"] == _digest(tensors, metadata)
    except (SafetensorError, *UNREADABLE) as error:
        raise DamagedError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if not intact:
        raise DamagedError(f"{path.name} does not match its checksum")
    return tensors, metadata


def _metadata(content: bytes) -> dict[str, str]:
    metadata: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Returns the SHA-256 over the metadata and every tensor's name, type, shape and bytes (bfloat16 too, which NumPy lacks)."""
    import torch

    total = hashlib.sha256("\n".join(metadata.get(key, "") for key in ("round", "state", "bases")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()

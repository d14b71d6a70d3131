"""Checkpoints: one file holds the tensors and the state that belongs to them, so that both become visible in one rename.

The file is an ordinary safetensors file; the state is JSON in its metadata, beside a SHA-256 over all of it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.files import atomic_write


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `round`."""

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class DamagedError(Exception):
    """The file is not a whole checkpoint."""


def writing(folder: Path, checkpoint: Checkpoint, keep: int) -> Callable[[], None]:
    """Takes the checkpoint down as it is now, and returns what writes it; that may be called in another thread.

    It writes folder/round_0003.safetensors atomically, then removes all but the `keep` latest rounds. The state must be JSON: what is read
    back has text keys and lists. Floats and tensors of all types come back bit for bit.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    state = json.dumps(checkpoint.state)

    def write() -> None:
        from safetensors.torch import save as serialized

        metadata = {"round": str(checkpoint.round), "state": state, "sha256": _digest(checkpoint.round, tensors, state)}
        folder.mkdir(exist_ok=True)
        atomic_write(folder / f"round_{checkpoint.round:04d}.safetensors", serialized(tensors, metadata))
        for old in saved(folder)[:-keep]:
            old.unlink()

    return write


def saved(folder: Path) -> list[Path]:
    """Returns the checkpoints' paths, the latest round last."""
    return sorted(folder.glob("round_*.safetensors"), key=lambda path: int(path.stem.removeprefix("round_")))


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in `path`, on the CPU. Raises DamagedError if a single bit of it is wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    content = path.read_bytes()
    try:
        header_size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
        tensors = tensors_of(content)
        round_, state = int(metadata["round"]), metadata["state"]
        intact = metadata["sha256"] == _digest(round_, tensors, state)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if not intact:
        raise DamagedError(f"{path.name} does not match its checksum")
    return Checkpoint(round_, tensors, json.loads(state))


def _digest(round_: int, tensors: dict[str, Tensor], state: str) -> str:
    """Returns the SHA-256 over round, state and every tensor's name, type, shape and bytes (bfloat16 too, which NumPy lacks)."""
    import torch

    total = hashlib.sha256(f"{round_}\n{state}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()

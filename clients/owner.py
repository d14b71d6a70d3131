"""client.yaml, the decisions of the owner of a client's data: where the data and the base model are, and what the client accepts.

Nothing that a server sends changes them. What the client does not accept is refused with a reason, which the server records.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, get_type_hints

import yaml

from fedsim.choices import Partition, PrivacyUnit
from fedsim.config import Config
from fedsim.docstrings import field_docstrings
from fedsim.errors import UserError, nearest

STRENGTH = (PrivacyUnit.none, PrivacyUnit.client, PrivacyUnit.example)
"""Units of privacy by how little the client must trust the server: with unit=client the server adds the noise, except to masked uploads."""


class RefusedError(Exception):
    """The owner does not accept the server's request; the reason is sent to the server."""


@dataclass(frozen=True)
class Owner:
    """The contents of client.yaml. Paths are relative to the file's folder."""

    client: int
    """Number of this client in the federation, from 0; the SuperNode's partition-id."""
    data_path: Optional[str] = None
    """File or folder of this client's own data; null loads the sets from the hub by name."""
    data_sets: list[str] = field(default_factory=list)
    """Names of the training sets, as in data.train; empty takes the experiment's."""
    shard: bool = False
    """Train on the shard that a simulation would give this client, not on all of the data: to try out a deployment."""
    token_cache: bool = False
    """Keep the tokens of large data in ~/.cache/fedsim/tokens, a copy outside this folder, to start faster."""
    model_path: Optional[str] = None
    """Folder or hub id of the base model; null is the one inside the package."""
    device: str = "auto"
    """Device of the base model, as in model.device."""
    methods: list[str] = field(default_factory=list)
    """Accepted methods; empty accepts all."""
    max_local_steps: int = 1000
    """Most local steps in a round."""
    min_privacy: str = "none"
    """Weakest unit of privacy accepted: none, client (noise added by the server, or here if masked) or example (noise added here).
    Zero noise is refused. Only max_epsilon, which requires example, demands a sufficient amount."""
    masked_only: bool = False
    """Send only masked uploads, which requires privacy.secure_aggregation=true: the server then sees sums of several clients.
    Evaluation on the owner's own rows is refused too."""
    max_epsilon: Optional[float] = None
    """Example-level budget over all runs that this client ever joins; null sets no limit."""
    delta: Optional[float] = None
    """Delta at which max_epsilon holds; null takes 1 / n^1.1 for the client's n examples, or the delta used before if it is smaller."""
    max_message_mb: int = 4096
    """Largest message in megabytes (10^6 bytes), in either direction."""
    idle_minutes: float = 60.0
    """Minutes without work after which the worker ends; the next message starts it again."""
    folder: str = "worker"
    """Where the worker keeps its socket, log, memory, last answers and accountant."""


def owner_text(owner: Owner) -> str:
    """Returns the text of client.yaml, with the meaning of every option above it."""
    lines = [
        "# What the owner of this client decides. It holds from the worker's next start: fedsim worker FILE --stop ends the present one.",
        "# Paths are relative to this file.",
    ]
    for name, meaning in field_docstrings(sys.modules[__name__])["Owner"].items():
        lines += [f"\n# {meaning}", f"{name}: {json.dumps(getattr(owner, name), ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


_BOUNDS: dict[str, tuple[float, float]] = {
    "client": (0, 10**9),
    "max_local_steps": (1, 10**9),
    "max_epsilon": (1e-9, 1e9),
    "delta": (1e-300, 0.5),
    "max_message_mb": (1, 10**9),
    "idle_minutes": (0.001, 10**9),
}


def load_owner(path: Path) -> Owner:
    """Reads client.yaml and makes its paths absolute. Raises UserError, with a one-line message, if it is invalid."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"Expected the client's file {path}, but: {error.strerror}. Write one, or `fedsim deploy init`.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, got {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `client:` and other options, got {type(values).__name__}.")
    return _with_absolute_paths(_checked(path, values), path.resolve().parent)


def accept(owner: Owner, config: Config) -> None:
    """Raises RefusedError with the reason if the owner does not accept this configuration."""
    if owner.methods and config.method.name not in owner.methods:
        raise RefusedError(f"method.name={config.method.name} is not among those accepted: {', '.join(owner.methods)}")
    unit, least = config.privacy.unit, PrivacyUnit[owner.min_privacy]
    if STRENGTH.index(unit) < STRENGTH.index(least):
        raise RefusedError(f"privacy.unit={unit.name} is weaker than {least.name}, the least accepted")
    if least is not PrivacyUnit.none and config.privacy.noise_multiplier == 0:
        raise RefusedError(f"privacy.noise_multiplier=0 adds no noise, which min_privacy={least.name} asks for")
    if owner.masked_only and not config.privacy.secure_aggregation:
        raise RefusedError("privacy.secure_aggregation=false would send the upload as it is: masked_only takes sums of several clients")
    if owner.max_epsilon is not None and unit is not PrivacyUnit.example:
        raise RefusedError(f"privacy.unit={unit.name} keeps no budget of the client's own: max_epsilon takes privacy.unit=example only")
    if config.federation.clients <= owner.client:
        raise RefusedError(f"federation.clients={config.federation.clients} has no client {owner.client}, which this is")


def own_view(owner: Owner, config: Config) -> Config:
    """Returns the configuration to run here: the server's, with the owner's data, model and device.

    Options that partition the experiment's data do not apply to the owner's own data and are reset.
    """
    model = dataclasses.replace(config.model, path=owner.model_path, device=owner.device)
    data = dataclasses.replace(
        config.data,
        path=owner.data_path,
        train=owner.data_sets or config.data.train,
        token_cache=owner.token_cache,
        owner=None if owner.shard else owner.client,
        train_examples=config.data.train_examples if owner.shard else None,
        client_column=config.data.client_column if owner.shard else None,
        task_column=config.data.task_column if owner.shard else None,
    )
    federation = config.federation
    if not owner.shard:
        federation = dataclasses.replace(federation, partition=Partition.iid, quantity_sigma=0.0)
    return dataclasses.replace(config, model=model, data=data, federation=federation, run_dir=None, resume=False, overwrite=False)


def _checked(path: Path, values: dict[str, Any]) -> Owner:
    kinds = get_type_hints(Owner)
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{path}: expected options out of {', '.join(kinds)}, got {name!r}.{nearest(str(name), list(kinds))}")
        if not _fits(kinds[name], value):
            raise UserError(f"{path}: expected {name} to be {_described(kinds[name])}, got {value!r}.")
        low, high = _BOUNDS.get(name, (float("-inf"), float("inf")))
        if name in _BOUNDS and value is not None and not low <= value <= high:
            raise UserError(f"{path}: expected {name} between {low:g} and {high:g}, got {value}.")
    if "client" not in values:
        raise UserError(f"{path}: expected `client:` with the number of this client, got none.")
    units = [unit.name for unit in STRENGTH]
    if values.get("min_privacy", "none") not in units:
        raise UserError(f"{path}: expected min_privacy among {', '.join(units)}, got {values['min_privacy']!r}.")
    return Owner(**values)


def _fits(kind: Any, value: Any) -> bool:
    if kind == Optional[str] or kind == Optional[float]:
        return value is None or _fits(str if kind == Optional[str] else float, value)
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _described(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list[str]: "a list of names"}
    return words.get(kind) or {Optional[str]: "text or null", Optional[float]: "a number or null"}[kind]


def _with_absolute_paths(owner: Owner, folder: Path) -> Owner:
    """Resolves local paths relative to the file; a name that no file there has is a hub id."""

    def local(path: str | None) -> str | None:
        if path is None:
            return None
        home = str(Path(path).expanduser()) if path.startswith("~") else path
        return str(folder / home) if home != path or path.startswith(".") or (folder / home).exists() else path

    return dataclasses.replace(
        owner, data_path=local(owner.data_path), model_path=local(owner.model_path), folder=str(folder / Path(owner.folder).expanduser())
    )

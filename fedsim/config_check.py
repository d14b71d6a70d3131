"""Checks the values of options, and contradictions between them that do not depend on method, data or model."""

import math
import re
from dataclasses import dataclass
from typing import Any

from fedsim.choices import AUTO, Partition
from fedsim.config import Config
from fedsim.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """Finite numbers between `low` and `high`; an open end is excluded."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        lower = f"{'>' if self.low_open else '>='} {_written(self.low)}"
        return lower if self.high == math.inf else f"{lower} and {'<' if self.high_open else '<='} {_written(self.high)}"


def _written(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:g}"


MOST = 1_000_000
"""Most rounds, clients, and local steps or epochs: more than any run needs, few enough to iterate over."""

_COUNT = Bounds(1, MOST)
_AT_LEAST_ONE, _NOT_NEGATIVE, _POSITIVE, _DECAY = Bounds(1), Bounds(0), Bounds(0, low_open=True), Bounds(0, 1, high_open=True)

MAY_BE_AUTO = ("training.tokens_per_pass", "evaluation.tokens_per_pass")
"""Options that accept a number or `AUTO`."""

BOUNDS = {
    "method.residual_rank": _AT_LEAST_ONE,
    "method.heads": _AT_LEAST_ONE,
    "method.client_heads": _AT_LEAST_ONE,
    "adapter.rank": _AT_LEAST_ONE,
    "adapter.refresh_every": _NOT_NEGATIVE,
    "adapter.init_samples": _AT_LEAST_ONE,
    "adapter.scaling": _POSITIVE,
    "data.train_examples": _AT_LEAST_ONE,
    "data.test_examples": _AT_LEAST_ONE,
    "data.max_length": Bounds(8),
    "data.owner": _NOT_NEGATIVE,
    "federation.clients": _COUNT,
    "federation.rounds": _COUNT,
    "federation.fraction": Bounds(0, 1, low_open=True),
    "federation.alpha": _POSITIVE,
    "federation.quantity_sigma": _NOT_NEGATIVE,
    "federation.dropout": Bounds(0, 1, high_open=True),
    "federation.deadline": _POSITIVE,
    "federation.concurrency": _AT_LEAST_ONE,
    "federation.buffer": _AT_LEAST_ONE,
    "federation.round_timeout": _POSITIVE,
    "federation.min_replies": _POSITIVE,
    "federation.over_selection": _NOT_NEGATIVE,
    "federation.retries": _NOT_NEGATIVE,
    "federation.max_examples": _AT_LEAST_ONE,
    "training.learning_rate": _POSITIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.beta1": _DECAY,
    "training.beta2": _DECAY,
    "training.epsilon": _POSITIVE,
    "training.momentum": _DECAY,
    "training.warmup_ratio": _DECAY,
    "training.batch_size": _AT_LEAST_ONE,
    "training.accumulation": _AT_LEAST_ONE,
    "training.local_steps": _COUNT,
    "training.local_epochs": _COUNT,
    "training.tokens_per_pass": _AT_LEAST_ONE,
    "training.proximal_mu": _NOT_NEGATIVE,
    "server.trimmed": Bounds(0, 0.5, high_open=True),
    "server.malicious": _NOT_NEGATIVE,
    "server.kept": _NOT_NEGATIVE,
    "server.learning_rate": _POSITIVE,
    "server.momentum": _DECAY,
    "server.beta2": _DECAY,
    "server.tau": _POSITIVE,
    "server.max_update_norm": _POSITIVE,
    "compression.density": Bounds(0, 1, low_open=True),
    "privacy.epsilon": _POSITIVE,
    "privacy.noise_multiplier": _NOT_NEGATIVE,
    "privacy.clip_norm": _POSITIVE,
    "privacy.delta": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.init_share": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.init_noise_multiplier": _NOT_NEGATIVE,
    "privacy.clip_quantile": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.clip_rate": _POSITIVE,
    "secure.bits": Bounds(2, 24),
    "secure.range": _POSITIVE,
    "secure.gradient_range": _POSITIVE,
    "secure.threshold": Bounds(0.5, 1, low_open=True),
    "secure.neighbours": _NOT_NEGATIVE,
    "audit.canaries": _NOT_NEGATIVE,
    "audit.confidence": Bounds(0, 1, low_open=True, high_open=True),
    "evaluation.every": _NOT_NEGATIVE,
    "evaluation.max_new_tokens": _AT_LEAST_ONE,
    "evaluation.tokens_per_pass": _AT_LEAST_ONE,
    "engine.wait_seconds": _NOT_NEGATIVE,
    "engine.actors": _AT_LEAST_ONE,
    "engine.cohort_size": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
}
"""Allowed values of the numeric options; null is allowed if the type allows it."""


def check(config: Config) -> None:
    """Raises UserError for the first wrong value or contradiction that shows without data and model."""
    for key, bounds in BOUNDS.items():
        value = value_of(config, key)
        if value == AUTO and key in MAY_BE_AUTO:
            continue
        if isinstance(value, str):
            raise UserError(f"Expected {key} to be {AUTO} or a number {bounds}, got {value!r}. Give {key}= one of them.")
        if value is not None and value not in bounds:
            finite = "" if math.isfinite(value) else " and finite"
            raise UserError(f"Expected {key} {bounds}{finite}, got {value}. Give {key}= a value in that range.")
    for key in ("data.train", "data.test", "data.labels", "adapter.target_modules"):
        _check_names(key, value_of(config, key))
    for key in ("model.path", "data.path", "data.client_column", "data.task_column", "run_dir"):
        if value_of(config, key) == "":
            raise UserError(f"Expected {key} to name something, got an empty text. Write {key}=null for none.")
    _check_contradictions(config)


def value_of(config: Config, key: str) -> Any:
    """Returns the value of an option by its dotted name."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_names(key: str, names: list[str]) -> None:
    if len(names) == 1 and key == "data.labels":
        raise UserError(f"Expected at least two names in {key}, or none, got {names[0]!r} alone. Write {key}=[name,another].")
    if not names and key not in ("data.labels", "adapter.target_modules"):
        raise UserError(f"Expected at least one name in {key}, got an empty list. Write {key}=[name].")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"Expected each name in {key} once, got {repeated[0]!r} more than once. Leave out the repetition.")


def _check_natural(config: Config) -> None:
    column, sigma, kind = config.data.client_column, config.federation.quantity_sigma, config.federation.partition
    if kind is not Partition.natural and column is not None:
        raise UserError(
            f"Expected federation.partition=natural with data.client_column={column}, got {kind.name}, which ignores owners. "
            "Give federation.partition=natural, or leave the column out."
        )
    if kind is Partition.natural and column is None:
        raise UserError("Expected data.client_column with federation.partition=natural, got none. Name the column with each row's owner.")
    if kind is Partition.natural and sigma:
        raise UserError(
            f"Expected federation.quantity_sigma=0 with federation.partition=natural, where clients hold what owners have, got {sigma:g}. "
            "Write federation.quantity_sigma=0."
        )


def _check_contradictions(config: Config) -> None:
    if config.resume and config.overwrite:
        raise UserError("Expected resume=true or overwrite=true, got both. Resume continues a run, overwrite starts it again: remove one.")
    if config.resume and config.run_dir is None:
        raise UserError("Expected run_dir with resume=true, got none. Name the folder of the run to go on with: run_dir=...")
    examples = config.data.train_examples
    if examples is not None and examples < config.federation.clients:
        raise UserError(
            f"Expected at least one training example for each client, got data.train_examples={examples} and "
            f"federation.clients={config.federation.clients}. Raise the first or lower the second."
        )
    _check_natural(config)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.model.device):
        raise UserError(f"Expected model.device auto, cpu, cuda or cuda:<number>, got {config.model.device!r}. Choose one of them.")

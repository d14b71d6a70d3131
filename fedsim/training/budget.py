"""Limits the tokens of a pass: chosen for the device, and halved when it runs out of memory.

The choice changes only the order of float additions. On a CPU a pass should roughly fit the caches, and more tokens gain nothing; on a GPU
more tokens keep it busy, and memory is the limit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from fedsim.choices import AUTO, PrivacyUnit
from fedsim.config import Config, EvaluationConfig, TrainingConfig
from fedsim.core.forms import DENSE, AdapterSpec
from fedsim.core.memory import FACTOR_BYTES, ModelShape, pass_bytes, shape_of
from fedsim.core.methods import Method
from fedsim.core.participation import round_size

Result = TypeVar("Result")

TOKENS_PER_THREAD = 512  # the best for models of 2 to 20 M parameters; from 256 to 8192 tokens speed differs by a tenth
CPU_RANGE = (1024, 16_384)
GPU_RANGE = (256, 65_536)
GPU_SHARE = 0.9
"""Share of the free memory for passes and the clients' factors. Passes take 0.78 to 1.02 of their estimate (section k of the
benchmarks); the rest is for workspaces and fragmentation."""

GPU_SHARE_OF_ANSWERS = 0.6
SMALLEST = 16  # tokens; a budget is not halved below this
GENERATED = 16_384  # tokens of a generation batch on a CPU, and the smallest choice on a GPU
GENERATED_ON_GPU = (GENERATED, 524_288)
LOSS_SHARE = 4  # tokens of a generation batch per token of a loss pass, which should roughly fit the caches
ROW_TOKENS = 64  # assumed length of a row when counting rows, since the data is not known yet
STACKS = 4  # copies of a client's factors: values, gradient, and two moments


@dataclass(frozen=True)
class Load:
    """What determines the memory of a pass besides its tokens, whatever the data."""

    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec(DENSE, {}, 1))
    trained: tuple[str, ...] = ()
    groups: int = 1  # largest number in a pass, each with its own factors
    rows: int = 1  # per group
    longest: int = 512  # tokens of the longest row
    held_bytes: int = 0  # allocated during every pass

    @classmethod
    def of(cls, config: Config, spec: AdapterSpec, method: Method) -> "Load":
        """Returns the load of local training with the most clients that one message to this process may name."""
        training, federation, engine = config.training, config.federation, config.engine
        drawn = round_size(federation.clients, federation.fraction)
        clients = 1 if method.pooled or engine.name == "deployment" else min(engine.cohort_size or drawn, drawn)
        units = clients * training.accumulation
        rows = training.batch_size
        if config.privacy.unit is PrivacyUnit.example:  # one gradient per row
            units, rows = units * rows, 1
        kinds = tuple(sorted(method.ever_trained))
        held = STACKS * FACTOR_BYTES * spec.num_parameters(kinds) * clients
        return cls(spec, kinds, units, rows, config.data.max_length, held)

    def of_weight_gradients(self, parameters: int) -> "Load":
        """Returns the load of passes that sum base-weight gradients of `parameters` entries; every layer keeps its input."""
        return replace(self, spec=replace(self.spec, form=DENSE), trained=("D",), groups=0, held_bytes=FACTOR_BYTES * parameters)

    def pass_bytes(self, shape: ModelShape, tokens: int, *, checkpointing: bool) -> float:
        """Returns the bytes that a pass of `tokens` tokens needs, including `held_bytes`."""
        groups = min(self.groups, -(-tokens // (ROW_TOKENS * self.rows)))
        length = min(self.longest, tokens)
        held = pass_bytes(shape, self.spec, self.trained, tokens, length=length, groups=groups, checkpointing=checkpointing)
        return self.held_bytes + held


NO_LOAD = Load()
"""The load of a base model alone."""


class TokenBudget:
    """This process's limit on the tokens of a pass, padded to its longest row; it may shrink while the process runs.

    Rows get up to 7 more positions (`padded_width`); the chosen limits leave room for them.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @classmethod
    def of(cls, training: TrainingConfig, model: nn.Module, load: Load = NO_LOAD) -> "TokenBudget":
        """Returns the budget of `training.tokens_per_pass`; auto chooses it for the model, its device and the load."""
        return cls(tokens_for_training(model, load) if training.tokens_per_pass == AUTO else int(training.tokens_per_pass))

    @classmethod
    def of_evaluation(cls, evaluation: EvaluationConfig, model: nn.Module) -> "TokenBudget":
        """Returns the budget of `evaluation.tokens_per_pass`; auto chooses it for the model and its device."""
        return cls(tokens_for_answers(model) if evaluation.tokens_per_pass == AUTO else int(evaluation.tokens_per_pass))

    def within_memory(self, work: Callable[[int], Result]) -> Result:
        """Returns work(tokens). When memory runs out, halves the budget and starts the work over.

        Raises torch.OutOfMemoryError if even the smallest budget is too large.
        """
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError:
                if self.tokens < 2 * SMALLEST:
                    raise
                self.tokens //= 2
            if torch.cuda.is_available():  # outside the except block, whose exception keeps the tensors of the pass alive
                torch.cuda.empty_cache()


def tokens_for_training(model: nn.Module, load: Load = NO_LOAD, *, checkpointing: bool | None = None) -> int:
    """Returns the most tokens of a pass for a model on its device: a power of two. `checkpointing` defaults to the model's own."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return tokens_on_cpu()
    activation_checkpointing: bool = model.is_activation_checkpointing if checkpointing is None else checkpointing  # type: ignore[assignment]
    return tokens_on_gpu(shape_of(model), load, free_bytes(device), checkpointing=activation_checkpointing)


def tokens_on_cpu() -> int:
    """Returns the most tokens of a pass on the CPU: a power of two."""
    return _within(TOKENS_PER_THREAD * torch.get_num_threads(), CPU_RANGE)


def tokens_on_gpu(shape: ModelShape, load: Load, free_bytes: int, *, checkpointing: bool) -> int:
    """Returns the most tokens of a pass on a GPU with `free_bytes` left after loading the model: a power of two."""
    low, tokens = GPU_RANGE
    while tokens > low and load.pass_bytes(shape, tokens, checkpointing=checkpointing) > GPU_SHARE * free_bytes:
        tokens //= 2
    return tokens


def tokens_for_losses(model: nn.Module, answers: int) -> int:
    """Returns the most tokens of a pass for losses without a gradient; `answers` is the tokens of a generation batch."""
    most = max(1, answers // LOSS_SHARE)
    return most if next(model.parameters()).device.type != "cuda" else min(most, tokens_for_training(model, checkpointing=False))


def tokens_for_answers(model: nn.Module) -> int:
    """Returns the most tokens of a generation batch for a model on its device: a power of two."""
    device = next(model.parameters()).device
    return tokens_for_answers_on_gpu(shape_of(model), free_bytes(device)) if device.type == "cuda" else GENERATED


def tokens_for_answers_on_gpu(shape: ModelShape, free_bytes: int) -> int:
    """Returns the most tokens of a generation batch on a GPU with `free_bytes` left after loading the model: a power of two."""
    return _within(int(GPU_SHARE_OF_ANSWERS * free_bytes / shape.answer_bytes), GENERATED_ON_GPU)


def free_bytes(device: torch.device) -> int:
    """Returns the unused bytes of a GPU, including those that this process has reserved but not allocated."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _within(tokens: int, limits: tuple[int, int]) -> int:
    low, high = limits
    return 1 << max(low, min(high, tokens)).bit_length() - 1

"""How many tokens share a pass: chosen from the device, and halved where it runs out of memory.

The choice changes nothing but the order of float additions. On a CPU a pass should stay near the caches, and more tokens than that bring
nothing; on a GPU more tokens keep it busy, and memory is the limit.
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

TOKENS_PER_THREAD = 512  # from 256 to 8192 tokens models of 2 to 20 M parameters differ by a tenth, and the best lies here
CPU_RANGE = (1024, 16_384)
GPU_RANGE = (256, 65_536)
GPU_SHARE = 0.9
"""Of the free memory, for passes and the clients' factors. Passes take 0.78 to 1.02 of what is estimated for them (section k of the
benchmarks); what is left is for workspaces and for gaps."""

GPU_SHARE_OF_ANSWERS = 0.6
SMALLEST = 16  # tokens; a budget is not halved below
GENERATED = 16_384  # tokens of a generation batch on a CPU, and the least that is tried on a GPU
GENERATED_ON_GPU = (GENERATED, 524_288)
LOSS_SHARE = 4  # how many times more tokens a generation batch has than a pass for losses, which stays near the caches
ROW_TOKENS = 64  # assumed length of a row where the number of rows matters: the data is not known yet
STACKS = 4  # of a client's factors: themselves, their gradient, and two moments


@dataclass(frozen=True)
class Load:
    """The memory that passes need besides that of their tokens, whatever the data."""

    spec: AdapterSpec = field(default_factory=lambda: AdapterSpec(DENSE, {}, 1))
    trained: tuple[str, ...] = ()
    groups: int = 1  # the most that meet in a pass, each with factors of its own
    rows: int = 1  # of a group
    longest: int = 512  # tokens of a row
    held_bytes: int = 0  # beside every pass

    @classmethod
    def of(cls, config: Config, spec: AdapterSpec, method: Method) -> "Load":
        """Returns the load of local training, of as many clients at once as one message of this process may name."""
        training, federation, engine = config.training, config.federation, config.engine
        drawn = round_size(federation.clients, federation.fraction)
        clients = 1 if method.pooled or engine.name == "deployment" else min(engine.cohort_size or drawn, drawn)
        units = clients * training.accumulation
        rows = training.batch_size
        if config.privacy.unit is PrivacyUnit.example:  # every row has gradients of its own
            units, rows = units * rows, 1
        kinds = tuple(sorted(method.ever_trained))
        held = STACKS * FACTOR_BYTES * spec.num_parameters(kinds) * clients
        return cls(spec, kinds, units, rows, config.data.max_length, held)

    def of_weight_gradients(self, parameters: int) -> "Load":
        """Returns the load of passes for gradients of base weights, of which so many numbers are summed: every layer keeps its input."""
        return replace(self, spec=replace(self.spec, form=DENSE), trained=("D",), groups=0, held_bytes=FACTOR_BYTES * parameters)

    def pass_bytes(self, shape: ModelShape, tokens: int, *, checkpointing: bool) -> float:
        """Returns what a pass of so many tokens needs, and what is held beside it."""
        groups = min(self.groups, -(-tokens // (ROW_TOKENS * self.rows)))
        length = min(self.longest, tokens)
        held = pass_bytes(shape, self.spec, self.trained, tokens, length=length, groups=groups, checkpointing=checkpointing)
        return self.held_bytes + held


NO_LOAD = Load()
"""That of a base model alone."""


class TokenBudget:
    """The most tokens of a pass, padded to its longest row, in this process; it may shrink while the process runs.

    Rows get up to 7 positions more (`padded_width`), which no memory is chosen so closely for.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @classmethod
    def of(cls, training: TrainingConfig, model: nn.Module, load: Load = NO_LOAD) -> "TokenBudget":
        """Returns what `training.tokens_per_pass` says, chosen for the model, its device and the load where it says auto."""
        return cls(chosen(model, load) if training.tokens_per_pass == AUTO else int(training.tokens_per_pass))

    @classmethod
    def of_evaluation(cls, evaluation: EvaluationConfig, model: nn.Module) -> "TokenBudget":
        """Returns what `evaluation.tokens_per_pass` says, chosen for the model and its device where it says auto."""
        return cls(chosen_for_answers(model) if evaluation.tokens_per_pass == AUTO else int(evaluation.tokens_per_pass))

    def within_memory(self, work: Callable[[int], Result]) -> Result:
        """Returns work(tokens). Where memory runs out, the budget is halved and the work is done anew from its beginning.

        Raises torch.OutOfMemoryError where even the smallest budget is too large.
        """
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError:
                if self.tokens < 2 * SMALLEST:
                    raise
                self.tokens //= 2
            if torch.cuda.is_available():  # outside the block above, whose exception keeps the tensors of the pass
                torch.cuda.empty_cache()


def chosen(model: nn.Module, load: Load = NO_LOAD, *, checkpointing: bool | None = None) -> int:
    """Returns the most tokens of a pass for a model on its device: a power of two. `checkpointing` is the model's own by default."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return chosen_on_cpu()
    sparing: bool = model.is_activation_checkpointing if checkpointing is None else checkpointing  # type: ignore[assignment]
    return chosen_for(shape_of(model), load, free_bytes(device), checkpointing=sparing)


def chosen_on_cpu() -> int:
    """Returns the most tokens of a pass on the CPU: a power of two."""
    return _within(TOKENS_PER_THREAD * torch.get_num_threads(), CPU_RANGE)


def chosen_for(shape: ModelShape, load: Load, free_bytes: int, *, checkpointing: bool) -> int:
    """Returns the most tokens of a pass on a GPU that has so much memory left once the model is there: a power of two."""
    low, tokens = GPU_RANGE
    while tokens > low and load.pass_bytes(shape, tokens, checkpointing=checkpointing) > GPU_SHARE * free_bytes:
        tokens //= 2
    return tokens


def chosen_for_losses(model: nn.Module, answers: int) -> int:
    """Returns the most tokens of a pass for losses without a gradient; `answers` are those of a generation batch."""
    most = max(1, answers // LOSS_SHARE)
    return most if next(model.parameters()).device.type != "cuda" else min(most, chosen(model, checkpointing=False))


def chosen_for_answers(model: nn.Module) -> int:
    """Returns the most tokens of a generation batch for a model on its device: a power of two."""
    device = next(model.parameters()).device
    return chosen_for_answers_within(shape_of(model), free_bytes(device)) if device.type == "cuda" else GENERATED


def chosen_for_answers_within(shape: ModelShape, free_bytes: int) -> int:
    """Returns the most tokens of a generation batch on a GPU that has so much memory left once the model is there: a power of two."""
    return _within(int(GPU_SHARE_OF_ANSWERS * free_bytes / shape.answer_bytes), GENERATED_ON_GPU)


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU that nobody uses, what this process has reserved for later included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _within(tokens: int, limits: tuple[int, int]) -> int:
    low, high = limits
    return 1 << max(low, min(high, tokens)).bit_length() - 1

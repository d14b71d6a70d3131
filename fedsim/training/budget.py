"""How many tokens share a pass: chosen from the device, and halved where it runs out of memory.

The choice changes nothing but the order of float additions. On a CPU a pass should stay near the caches, and more tokens than that bring
nothing; on a GPU more tokens keep it busy, and memory is the limit.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fedsim.choices import AUTO
from fedsim.config import EvaluationConfig, TrainingConfig
from fedsim.core.adapters import is_linear, weight_matrix
from fedsim.core.fused import GatedMLP
from fedsim.core.head_loss import gives_its_logits, logit_bytes

Result = TypeVar("Result")

TOKENS_PER_THREAD = 512  # from 256 to 8192 tokens models of 2 to 20 M parameters differ by a tenth, and the best lies here
CPU_RANGE = (1024, 16_384)
GPU_RANGE = (256, 65_536)
GPU_SHARE = 0.9
"""Of the free memory, for passes. They take 0.6 to 0.95 of what is reckoned with for them (section k of the benchmarks); what is left is
for the clients' factors, for workspaces and for gaps."""

GPU_SHARE_OF_ANSWERS = 0.6
SMALLEST = 16  # tokens; a budget is not halved below
GENERATED = 16_384  # tokens of a generation batch on a CPU, and the least that is tried on a GPU
GENERATED_ON_GPU = (GENERATED, 524_288)
LOSS_SHARE = 4  # what a generation batch has more tokens than a pass for losses, which stays near the caches


class TokenBudget:
    """The most tokens of a pass, padded to its longest row, in this process; it may shrink while the process runs.

    Rows get up to 7 positions more (`padded_width`), which no memory is chosen so closely for.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @classmethod
    def of(cls, training: TrainingConfig, model: nn.Module) -> "TokenBudget":
        """Returns what `training.tokens_per_pass` says, chosen for the model and its device where it says auto."""
        return cls(chosen(model) if training.tokens_per_pass == AUTO else int(training.tokens_per_pass))

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


def chosen(model: nn.Module, *, checkpointing: bool | None = None, besides: int = 0) -> int:
    """Returns the most tokens of a pass for a model on its device: a power of two; `checkpointing` as for `pass_bytes`.

    `besides` are bytes of what is going to lie beside the passes.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return _within(TOKENS_PER_THREAD * torch.get_num_threads(), CPU_RANGE)
    return chosen_for(model, _free_bytes(device) - besides, checkpointing=checkpointing)


def chosen_for_answers(model: nn.Module) -> int:
    """Returns the most tokens of a generation batch for a model on its device: a power of two."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return GENERATED
    return chosen_for_answers_within(model, _free_bytes(device))


def _free_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU that nobody uses, what this process has reserved for later included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chosen_for(model: nn.Module, free_bytes: int, *, element: int | None = None, checkpointing: bool | None = None) -> int:
    """Returns the most tokens of a pass on a GPU that has so much memory left once the model is there: a power of two; see `pass_bytes`."""
    low, tokens = GPU_RANGE
    kept = _bytes_kept(model, element, checkpointing)
    while tokens > low and kept * tokens + _logit_bytes(model, tokens) > GPU_SHARE * free_bytes:
        tokens //= 2
    return tokens


def chosen_for_losses(model: nn.Module, answers: int) -> int:
    """Returns the most tokens of a pass for losses without a gradient; `answers` are those of a generation batch."""
    most = max(1, answers // LOSS_SHARE)
    return most if next(model.parameters()).device.type != "cuda" else min(most, chosen(model, checkpointing=False))


def chosen_for_answers_within(model: nn.Module, free_bytes: int, *, element: int | None = None) -> int:
    """Returns the most tokens of a generation batch on a GPU that has so much memory left once the model is there."""
    return _within(int(GPU_SHARE_OF_ANSWERS * free_bytes / bytes_per_answer_token(model, element=element)), GENERATED_ON_GPU)


def bytes_per_answer_token(model: Any, *, element: int | None = None) -> int:
    """Returns about how many bytes one token of a generation batch takes: keys and values of all blocks, and what one block makes of it.

    `element` is the size of a number in bytes, by default the model's own.
    """
    element, settings = element or next(model.parameters()).element_size(), model.config
    blocks, heads = settings.num_hidden_layers, settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    cached = 2 * blocks * width * (getattr(settings, "num_key_value_heads", None) or heads)
    output = model.get_output_embeddings()
    made = sum(sum(module.weight.shape) for module in model.modules() if is_linear(module) and module is not output) // blocks
    return element * (cached + made)


def _within(tokens: int, limits: tuple[int, int]) -> int:
    low, high = limits
    return 1 << max(low, min(high, tokens)).bit_length() - 1


def pass_bytes(model: Any, tokens: int, *, element: int | None = None, checkpointing: bool | None = None) -> int:
    """Returns about how many bytes a pass takes: what the backward pass keeps, and the logits with their gradient.

    `element` is the size of a number in bytes, and `checkpointing` whether activation checkpointing is done; by default they are the
    model's own.
    """
    return _bytes_kept(model, element, checkpointing) * tokens + _logit_bytes(model, tokens)


def _bytes_kept(model: Any, element: int | None, checkpointing: bool | None) -> int:
    """Returns about how many bytes of a token are kept, logits left out.

    A linear layer keeps its input, and what is done with its output keeps as much again; a fused gate keeps the outputs alone (and an
    adapter that trains A its input, which is not counted). With activation checkpointing only the inputs of the blocks are kept, and what
    one block keeps, gradients included.
    """
    element, output = element or next(model.parameters()).element_size(), model.get_output_embeddings()
    head = {id(module) for module in output.modules()} if output is not None else set()
    linear = [module for module in model.modules() if is_linear(module) and id(module) not in head]
    if model.is_activation_checkpointing if checkpointing is None else checkpointing:
        blocks = max(len(module) for module in model.modules() if isinstance(module, nn.ModuleList))
        return int(element * (sum(2 * sum(each.weight.shape) for each in linear) // blocks + blocks * model.config.hidden_size))
    gates = [part for part in model.modules() if isinstance(part, GatedMLP) or GatedMLP.fits(part)]
    gated = {id(module) for gate in gates for module in gate.modules()}
    return element * sum(len(weight_matrix(each)) if id(each) in gated else 2 * sum(each.weight.shape) for each in linear)


def _logit_bytes(model: Any, tokens: int) -> int:
    output = model.get_output_embeddings()
    if output is None:
        return 0
    in_parts = is_linear(output) and gives_its_logits(model.config)  # not where the head has an adapter
    return int(logit_bytes(tokens, model.config.vocab_size, in_parts=in_parts))

"""Held-out accuracy and loss: greedy generation in batches with a key-value cache, and the mean loss of the reference responses.

Rows of similar prompt length share a batch, padded on the left; rows that have ended leave the batch when they are half of it. A
classifier answers with its most likely label.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.choices import TrainOn
from fedsim.config import DataConfig, EvaluationConfig
from fedsim.core.answers import is_correct
from fedsim.core.bi_encoder import BiEncoder
from fedsim.training.batches import collate, pack
from fedsim.training.budget import TokenBudget, tokens_for_losses
from fedsim.training.encoding import encode, encode_prompts, end_tokens, has_response, token_ids
from fedsim.training.labelled import collate_labelled, encode_labelled, label_logits
from fedsim.training.loss import batch_loss
from fedsim.types import AnyExample, EncodedExample, EncodedLabelled, Example, Family, Labelled


@dataclass(frozen=True)
class TaskResult:
    """A model's scores on the test examples of one task."""

    accuracy: float  # fraction of all examples that are answered correctly, 0 to 1
    loss: float  # mean over examples of the mean over the response's tokens; nan if every response was cut away
    num_examples: int
    num_losses: int = 0  # examples in the loss: those with some response left after truncation
    num_cut_off: int = 0  # generated answers without an end: evaluation.max_new_tokens or the model's context came first


@dataclass(frozen=True)
class Answer:
    """A generated answer: its tokens without the end-of-sequence token, and whether that token came."""

    tokens: list[int]
    ended: bool


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[AnyExample],
    config: EvaluationConfig,
    data: DataConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    budget: TokenBudget | None = None,
) -> TaskResult:
    """Answers every example and compares with the gold answers; `on_progress(done, total)` counts answered examples.

    `budget` bounds the batches and shrinks when memory runs out; without one it is chosen as `config` says.

    Guarantees: no gradient, no change of the model; the result does not depend on the order of the examples, beyond float tolerance. A
    prompt that fills the model's context counts as wrong, and so does an answer cut off before it states its final result;
    an answer that must equal a whole text stops at twice the length of the longest reference. A response that
    `data.max_length` cuts away has no loss. No examples give accuracy 0 and loss nan.
    """
    if not examples:
        return TaskResult(0.0, float("nan"), 0)
    budget = budget or TokenBudget.of_evaluation(config, model)
    labelled = [example for example in examples if isinstance(example, Labelled)]
    if labelled:
        return _classify(model, tokenizer, labelled, data, budget, on_progress)
    return _answer(model, tokenizer, [example for example in examples if isinstance(example, Example)], config, data, budget, on_progress)


def _classify(
    model: nn.Module,
    tokenizer: Any,
    labelled: Sequence[Labelled],
    data: DataConfig,
    budget: TokenBudget,
    on_progress: Callable[[int, int], None],
) -> TaskResult:
    device = next(model.parameters()).device
    encoded = encode_labelled(labelled, tokenizer, data.max_length, apart=isinstance(model, BiEncoder))

    def classified(most: int) -> tuple[float, int]:
        loss, correct, done = 0.0, 0, 0
        for each in pack({0: encoded}, len(encoded), most):
            rows = [row.example for row in each.rows if isinstance(row.example, EncodedLabelled)]
            batch = collate_labelled(rows, tokenizer.pad_token_id, device)
            logits = label_logits(model, batch)
            loss += float(functional.cross_entropy(logits.double(), batch.labels, reduction="sum"))
            correct += int((logits.argmax(1) == batch.labels).sum())
            done += len(rows)
            on_progress(done, len(labelled))
        return loss, correct

    with _inference(model), torch.no_grad():
        loss, correct = budget.within_memory(lambda most: classified(tokens_for_losses(model, most)))
    return TaskResult(correct / len(labelled), loss / len(labelled), len(labelled), len(labelled))


def _answer(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    config: EvaluationConfig,
    data: DataConfig,
    budget: TokenBudget,
    on_progress: Callable[[int, int], None],
) -> TaskResult:
    with _inference(model):
        prompts = list(encode_prompts(examples, tokenizer, data.max_length))
        encoded = encode(examples, tokenizer, data.max_length, TrainOn.response)
        longest = _max_answer_tokens(examples, tokenizer, config.max_new_tokens)
        answers = generate(
            model,
            prompts,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=longest,
            budget=budget,
            ends=end_tokens(examples, tokenizer),
            on_progress=on_progress,
        )
        texts = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
        pad_id = tokenizer.pad_token_id
        loss_budget = TokenBudget(tokens_for_losses(model, budget.tokens))
        loss = loss_budget.within_memory(lambda most: mean_loss(model, encoded, pad_id=pad_id, tokens_per_pass=most))
    read = zip(texts, examples, answers, strict=True)
    correct = sum(is_correct(text, example, ended=answer.ended) for text, example, answer in read)
    wrong_length = longest if longest < config.max_new_tokens else None  # answers of this length are wrong, not cut off by a limit
    num_cut_off = sum(not answer.ended and len(answer.tokens) != wrong_length for answer in answers)
    return TaskResult(correct / len(examples), loss, len(examples), sum(map(has_response, encoded)), num_cut_off)


def _max_answer_tokens(examples: Sequence[Example], tokenizer: Any, limit: int) -> int:
    """Returns the most tokens of a right answer: for whole texts twice the longest reference, which leaves room for white space."""
    if any(example.family is not Family.text for example in examples):
        return limit
    return min(limit, 2 * max(map(len, token_ids(tokenizer, [example.answer for example in examples], add_special_tokens=False))) + 1)


def mean_loss(model: nn.Module, examples: Sequence[EncodedExample], *, pad_id: int, tokens_per_pass: int) -> float:
    """Returns the mean over examples of each example's mean token loss, without gradient; nan if no example has a response."""
    device = next(model.parameters()).device
    usable = [example for example in examples if has_response(example)]
    if not usable:
        return float("nan")
    total = torch.zeros((), device=device, dtype=torch.float64)
    with torch.no_grad():
        for each in pack({0: usable}, len(usable), tokens_per_pass):
            _, losses = batch_loss(model, collate([row.example for row in each.rows], pad_id, device))
            total += losses.double().sum()
    return float(total) / len(usable)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    budget: TokenBudget,
    ends: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Returns the greedy continuation of each prompt, up to the end-of-sequence token, in the order of the prompts.

    An answer also ends with its prompt's token in `ends`.

    Guarantees: equal to generating one prompt at a time, to float tolerance. No sequence grows beyond the model's context; a prompt that
    fills it gets an empty answer, which has not ended. Batches of several rows stay within the budget even if every answer is as long as
    allowed; when memory runs out, a batch starts over with fewer rows.
    """
    context = getattr(model.config, "max_position_embeddings", None) or max(map(len, prompts), default=0) + max_new_tokens
    answers = [Answer([], ended=False)] * len(prompts)
    fitting = sorted((i for i, prompt in enumerate(prompts) if len(prompt) < context), key=lambda i: (len(prompts[i]), i))
    done = len(prompts) - len(fitting)

    def next_batch(most: int) -> list[list[int]]:
        lengths = [len(prompts[i]) + max_new_tokens for i in fitting]
        rows = fitting[: _num_rows(lengths, most)]
        try:
            row_ends = [eos_id if ends is None else ends[i] for i in rows]
            return _generate_batch(model, [prompts[i] for i in rows], row_ends, eos_id, pad_id, max_new_tokens, context)
        except torch.OutOfMemoryError:
            budget.tokens = min(budget.tokens, len(rows) * lengths[len(rows) - 1])  # so that halving it removes rows
            raise

    with torch.no_grad():
        while fitting:
            found = budget.within_memory(next_batch)
            for i, answer in zip(fitting, found, strict=False):
                answers[i] = _answer_of(answer[: context - len(prompts[i])], eos_id)
            fitting = fitting[len(found) :]
            done += len(found)
            on_progress(done, len(prompts))
    return answers


def _answer_of(tokens: list[int], eos_id: int) -> Answer:
    ended = eos_id in tokens
    return Answer(tokens[: tokens.index(eos_id)] if ended else tokens, ended)


def _num_rows(lengths: Sequence[int], most: int) -> int:
    """Returns how many of the rows, sorted by length, make a batch of at most `most` tokens; at least one."""
    rows = 1
    while rows < len(lengths) and lengths[rows] * (rows + 1) <= most:
        rows += 1
    return rows


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], eos_id: int, pad_id: int, max_new_tokens: int, context: int
) -> list[list[int]]:
    """Generates for prompts in order of length, until the shortest fills the context; a row's tokens beyond the context are meaningless.

    A row ends with its token of `ends` or the end-of-sequence token, and is filled with end-of-sequence tokens from there.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    max_new_tokens = min(max_new_tokens, context - len(prompts[0]))
    input_ids, mask = _pad_left(prompts, pad_id, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    tokens = torch.full((len(prompts), max_new_tokens), eos_id, device=device)  # a row that has ended stays at end-of-sequence
    alive = torch.arange(len(prompts), device=device)  # rows of `tokens` that are still in the batch
    own_ends = torch.tensor(ends, device=device)
    for step in range(max_new_tokens):
        output = model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        ended = (tokens[alive, step - 1] == eos_id) if step else torch.zeros(len(alive), dtype=torch.bool, device=device)
        likeliest = output.logits[:, -1].argmax(-1)
        tokens[alive, step] = torch.where(ended | (likeliest == own_ends[alive]), eos_id, likeliest)
        keep = tokens[alive, step] != eos_id
        num_kept = int(keep.sum())
        if num_kept == 0:
            break
        if num_kept * 2 <= len(alive):
            chosen = keep.nonzero().squeeze(1)
            cache.batch_select_indices(chosen)
            alive, mask, positions = alive[chosen], mask[chosen], positions[chosen]
        input_ids = tokens[alive, step].unsqueeze(1)
        positions = (positions[:, -1:] + 1).clamp(max=context - 1)  # there are no learnt positions beyond the context
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return tokens.tolist()


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask: [rows, tokens]."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode within the block: in training mode with activation checkpointing a model would not use its cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

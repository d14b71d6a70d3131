"""Tokenises text so that the prompt at training equals the prompt at generation, token for token.

Prompt and response are tokenised separately, so no merge across their border can differ between training and generation. Each call of the
tokenizer takes TEXTS_A_CALL texts: for short texts this takes two thirds of the time of one by one, and larger calls are slower again.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from fedsim.choices import TrainOn
from fedsim.training.conversations import end_of_turn, has_template, in_alpaca, rendered, shorter
from fedsim.types import EncodedExample, Example, Turn

TEXTS_A_CALL = 64
PROMPT_SHARE = 0.75  # of data.max_length: the most that a conversation takes before its response


def tokenized(tokenizer: Any, *texts: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yields the tokenizer's output for texts or pairs of texts, in order and TEXTS_A_CALL at a time: lists under its own names."""
    for start in range(0, len(texts[0]), TEXTS_A_CALL):
        yield tokenizer(*(list(column[start : start + TEXTS_A_CALL]) for column in texts), verbose=False, **options)


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
    """Yields the tokens of each text."""
    for found in tokenized(tokenizer, texts, **options):
        yield from found["input_ids"]


def encode_prompts(examples: Sequence[Example], tokenizer: Any, max_length: int | None = None) -> Iterator[list[int]]:
    """Yields the prompts' tokens: with the beginning-of-sequence token if the tokenizer adds one, never with an end.

    Conversations use the tokenizer's chat template if it has one. One that exceeds `PROMPT_SHARE` of `max_length` loses its oldest
    exchanges until it fits or one question is left; nothing else is cut. Raises UserError for a conversation that the template refuses.
    """
    most = None if max_length is None else int(PROMPT_SHARE * longest(max_length, tokenizer))
    for in_turns, group in groupby(examples, lambda example: bool(example.turns)):
        members = list(group)
        templated = in_turns and has_template(tokenizer)
        texts = [rendered(example.turns, tokenizer) if templated else example.prompt for example in members]
        for example, ids in zip(members, _prompts(texts, tokenizer, templated=templated), strict=True):
            turns: Sequence[Turn] | None = example.turns
            while most is not None and len(ids) > most and (turns := shorter(turns or ())):
                (ids,) = _prompts([rendered(turns, tokenizer) if templated else in_alpaca(turns)], tokenizer, templated=templated)
            yield ids


def _prompts(texts: Sequence[str], tokenizer: Any, *, templated: bool) -> Iterator[list[int]]:
    """Yields the tokens of prompts; `templated` ones contain all special tokens already."""
    if templated:
        yield from token_ids(tokenizer, texts, add_special_tokens=False)
        return
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    for ids in token_ids(tokenizer, texts):
        while len(ids) > 1 and ids[-1] in ends:
            ids = ids[:-1]
        yield ids


def longest(max_length: int, tokenizer: Any) -> int:
    """Returns the tokens of the longest sequence: `max_length`, or less if the model reads less."""
    return int(min(max_length, tokenizer.model_max_length))


def describe_limit(max_length: int, tokenizer: Any) -> str:
    """Returns the longest sequence and what bounds it, for a message."""
    limit = longest(max_length, tokenizer)
    why = "data.max_length" if limit == max_length else f"data.max_length is {max_length}, but the model reads no more"
    return f"{limit} tokens ({why})"


def end_tokens(examples: Sequence[Example], tokenizer: Any) -> list[int]:
    """Returns the token that ends each response: the end-of-sequence token, or the chat template's end of a turn."""
    chats = has_template(tokenizer) and any(example.turns for example in examples)
    end = end_of_turn(tokenizer) if chats else tokenizer.eos_token_id
    return [end if example.turns else tokenizer.eos_token_id for example in examples]


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, train_on: TrainOn) -> list[EncodedExample]:
    """Returns prompt, response and end token of each example, truncated to `max_length` or to the tokenizer's own limit.

    If nothing of the response is left, no token carries a loss: see `has_response`.
    """
    prompts = encode_prompts(examples, tokenizer, max_length)
    responses = token_ids(tokenizer, [example.response for example in examples], add_special_tokens=False)
    limit, ends = longest(max_length, tokenizer), end_tokens(examples, tokenizer)
    rows = zip(prompts, responses, ends, strict=True)
    return [_joined(prompt, [*response, end], limit, train_on) for prompt, response, end in rows]


def _joined(prompt: list[int], response: list[int], limit: int, train_on: TrainOn) -> EncodedExample:
    ids = [*prompt, *response][:limit]
    start = min(len(prompt), len(ids))
    if train_on is TrainOn.all and start < len(ids):
        start = 1  # the first token is not predicted
    return EncodedExample(np.array(ids, dtype=np.int32), start)


def is_truncated(encoded: EncodedExample, ends: Collection[int]) -> bool:
    """Returns whether truncation removed part of the response, which otherwise ends with one of `ends` (see `end_tokens`)."""
    return encoded.input_ids[-1] not in ends


def has_response(encoded: EncodedExample) -> bool:
    """Returns whether any token carries a loss; false if truncation removed the whole response."""
    return encoded.loss_start < encoded.num_tokens

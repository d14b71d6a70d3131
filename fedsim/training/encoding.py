"""From text to tokens: the prompt at training is token for token the prompt at generation.

Prompt and response are tokenised apart, so no merge across their border can differ between training and generation. The tokenizer is asked
for a few texts at a time, which for short texts takes two thirds of the time of one by one; more at a time are slower again.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from fedsim.choices import TrainOn
from fedsim.training.conversations import end_of_turn, in_turns, rendered, shorter
from fedsim.types import EncodedExample, Example, Turn

TEXTS_A_CALL = 64


def tokenized(tokenizer: Any, *texts: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yields what the tokenizer makes of texts, or of pairs of texts, in order and some at a time: lists under its own names."""
    for start in range(0, len(texts[0]), TEXTS_A_CALL):
        yield tokenizer(*(list(column[start : start + TEXTS_A_CALL]) for column in texts), verbose=False, **options)


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
    """Yields the tokens of each text."""
    for found in tokenized(tokenizer, texts, **options):
        yield from found["input_ids"]


def encode_prompts(examples: Sequence[Example], tokenizer: Any, max_length: int | None = None) -> Iterator[list[int]]:
    """Yields the prompts' tokens, uncut: with the beginning-of-sequence token where the tokenizer adds one, never with an end.

    Conversations are in the form of the tokenizer's chat template where it has one. Of one that is longer than `max_length` with its
    response the oldest exchanges are left out, as far as that helps. Raises UserError for one that the template refuses.
    """
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    for templated, group in groupby(examples, lambda example: in_turns(example, tokenizer)):
        if templated:
            yield from _conversations(list(group), tokenizer, max_length)
            continue
        for ids in token_ids(tokenizer, [example.prompt for example in group]):
            while len(ids) > 1 and ids[-1] in ends:
                ids = ids[:-1]
            yield ids


def _conversations(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> Iterator[list[int]]:
    def encoded(texts: Sequence[str]) -> Iterator[list[int]]:
        return token_ids(tokenizer, texts, add_special_tokens=False)

    prompts = encoded([rendered(example.turns, tokenizer) for example in examples])
    responses = encoded([example.response for example in examples])
    limit = None if max_length is None else _limit(max_length, tokenizer)
    for example, ids, response in zip(examples, prompts, responses, strict=True):
        turns: Sequence[Turn] | None = example.turns
        while limit is not None and len(ids) + len(response) + 1 > limit and (turns := shorter(turns or ())):
            (ids,) = encoded([rendered(turns, tokenizer)])
        yield ids


def _limit(max_length: int, tokenizer: Any) -> int:
    return int(min(max_length, tokenizer.model_max_length))


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, train_on: TrainOn) -> list[EncodedExample]:
    """Returns prompt, response and end of each, cut at the end to `max_length` or to the tokenizer's own limit.

    The end is the end-of-sequence token, or that of a turn in a conversation. Where the cut leaves nothing of the response, no token
    carries a loss: see `has_response`.
    """
    prompts = encode_prompts(examples, tokenizer, max_length)
    responses = token_ids(tokenizer, [example.response for example in examples], add_special_tokens=False)
    limit, ends = _limit(max_length, tokenizer), [tokenizer.eos_token_id] * len(examples)
    if chats := [place for place, example in enumerate(examples) if in_turns(example, tokenizer)]:
        end = end_of_turn(tokenizer)
        for place in chats:
            ends[place] = end
    return [_joined(prompt, [*response, end], limit, train_on) for prompt, response, end in zip(prompts, responses, ends, strict=True)]


def _joined(prompt: list[int], response: list[int], limit: int, train_on: TrainOn) -> EncodedExample:
    ids = [*prompt, *response][:limit]
    start = min(len(prompt), len(ids))
    if train_on is TrainOn.all and start < len(ids):
        start = 1  # the first token is not predicted
    return EncodedExample(np.array(ids, dtype=np.int32), start)


def has_response(encoded: EncodedExample) -> bool:
    """Whether any token carries a loss; false where the cut to the longest sequence took the whole response."""
    return encoded.loss_start < encoded.num_tokens

"""From text to tokens: the prompt at training is token for token the prompt at generation.

Prompt and response are tokenised apart, so no merge across their border can differ between training and generation. The tokenizer is asked
for a few texts at a time, which for short texts takes two thirds of the time of one by one; more at a time are slower again.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from fedsim.choices import TrainOn
from fedsim.errors import UserError
from fedsim.types import EncodedExample, Example

TEXTS_A_CALL = 64


def tokenized(tokenizer: Any, *texts: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yields what the tokenizer makes of texts, or of pairs of texts, in order and some at a time: lists under its own names."""
    for start in range(0, len(texts[0]), TEXTS_A_CALL):
        yield tokenizer(*(list(column[start : start + TEXTS_A_CALL]) for column in texts), verbose=False, **options)


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
    """Yields the tokens of each text."""
    for found in tokenized(tokenizer, texts, **options):
        yield from found["input_ids"]


def encode_prompts(examples: Sequence[Example], tokenizer: Any) -> Iterator[list[int]]:
    """Yields the prompts' tokens, uncut: with the beginning-of-sequence token where the tokenizer adds one, never with an end.

    Conversations are in the form of the tokenizer's chat template where it has one. Raises UserError for one that the template refuses.
    """
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    for in_turns, group in groupby(examples, lambda example: bool(example.turns) and has_chat_template(tokenizer)):
        if in_turns:
            yield from token_ids(tokenizer, [_templated(tokenizer, example) for example in group], add_special_tokens=False)
            continue
        for ids in token_ids(tokenizer, [example.prompt for example in group]):
            while len(ids) > 1 and ids[-1] in ends:
                ids = ids[:-1]
            yield ids


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a form of its own for conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def _templated(tokenizer: Any, example: Example) -> str:
    turns = [turn._asdict() for turn in example.turns]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template's own code raises what it likes
        raise UserError(
            f"The chat template of the model refuses a conversation of {', '.join(turn.role for turn in example.turns)}: {error}. "
            "Leave such rows out, or take a model without a template, which reads conversations in Alpaca's form."
        ) from error


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, train_on: TrainOn) -> list[EncodedExample]:
    """Returns prompt, response and end-of-sequence token of each, cut at the end to `max_length` or to the tokenizer's own limit.

    Where the cut leaves nothing of the response, no token carries a loss: see `has_response`.
    """
    prompts = encode_prompts(examples, tokenizer)
    responses = token_ids(tokenizer, [example.response for example in examples], add_special_tokens=False)
    limit, end = min(max_length, tokenizer.model_max_length), tokenizer.eos_token_id
    return [_joined(prompt, [*response, end], limit, train_on) for prompt, response in zip(prompts, responses, strict=True)]


def _joined(prompt: list[int], response: list[int], limit: int, train_on: TrainOn) -> EncodedExample:
    ids = [*prompt, *response][:limit]
    start = min(len(prompt), len(ids))
    if train_on is TrainOn.all and start < len(ids):
        start = 1  # the first token is not predicted
    return EncodedExample(np.array(ids, dtype=np.int32), start)


def has_response(encoded: EncodedExample) -> bool:
    """Whether any token carries a loss; false where the cut to the longest sequence took the whole response."""
    return encoded.loss_start < encoded.num_tokens

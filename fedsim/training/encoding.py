"""From text to tokens: the prompt at training is token for token the prompt at generation.

Prompt and response are tokenised apart, so no merge across their border can differ between training and generation.
"""

from typing import Any

from fedsim.choices import TrainOn
from fedsim.types import EncodedExample, Example


def encode_prompt(example: Example, tokenizer: Any) -> tuple[int, ...]:
    """Returns the prompt's tokens, uncut: with the beginning-of-sequence token where the tokenizer adds one, never with an end."""
    ids = tokenizer(example.prompt, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(ids) > 1 and ids[-1] in ends:
        ids = ids[:-1]
    return tuple(ids)


def encode(example: Example, tokenizer: Any, max_length: int, train_on: TrainOn) -> EncodedExample:
    """Returns prompt, response and end-of-sequence token, cut at the end to `max_length` or to the tokenizer's own limit.

    Where the cut leaves nothing of the response, no token carries a loss: see `has_response`.
    """
    limit = min(max_length, tokenizer.model_max_length)
    prompt = encode_prompt(example, tokenizer)
    response = tokenizer(example.response, add_special_tokens=False, verbose=False)["input_ids"]
    ids = (*prompt, *response, tokenizer.eos_token_id)[:limit]
    start = min(len(prompt), len(ids))
    if train_on is TrainOn.all and start < len(ids):
        start = 1  # the first token is not predicted
    return EncodedExample(ids, start)


def has_response(encoded: EncodedExample) -> bool:
    """Whether any token carries a loss; false where the cut to the longest sequence took the whole response."""
    return encoded.loss_start < encoded.num_tokens

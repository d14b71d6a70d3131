"""Two texts, or one, and a label, for an encoder with a classification head: from text to tokens, and the loss of a row.

As for generated answers, no row's loss depends on another row: it is the cross-entropy of its own label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.training.encoding import token_ids, tokenized
from fedsim.training.padding import padded_width
from fedsim.training.stack import on_device
from fedsim.types import EncodedPair, Pair, Tokens


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, max_length: int, *, apart: bool = False) -> list[EncodedPair]:
    """Returns the text of each, or both, in the form of the tokenizer, cut to `max_length` or to the tokenizer's own limit.

    Of two texts the longer one is cut. All pairs have as many texts. Where they are read `apart`, each is a sequence of its own, of at
    most its part of `max_length`.
    """
    if not pairs:
        return []
    texts = list(zip(*(pair.texts for pair in pairs), strict=True))
    limit = min(max_length // len(texts) if apart else max_length, tokenizer.model_max_length)
    labels = [pair.labels.index(pair.answer) for pair in pairs]
    if apart:
        sequences = zip(*(token_ids(tokenizer, column, truncation=True, max_length=limit) for column in texts), strict=True)
        return [
            EncodedPair(_array([*first, *chain(*second)]), _array([]), label, split=len(first) if second else 0)
            for (first, *second), label in zip(sequences, labels, strict=True)
        ]
    rows = (row for found in tokenized(tokenizer, *texts, truncation="longest_first", max_length=limit) for row in _rows(found))
    return [EncodedPair(_array(ids), _array(segments), label) for (ids, segments), label in zip(rows, labels, strict=True)]


def _rows(found: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Returns tokens and segments of each pair of a call of the tokenizer; no segments where the model is not told them."""
    ids = found["input_ids"]
    return zip(ids, found.get("token_type_ids", [[]] * len(ids)), strict=True)


def _array(ids: list[int]) -> Tokens:
    return np.array(ids, dtype=np.int32)


@dataclass(frozen=True)
class PairBatch:
    """Padded tensors of a pass. Padding is on the right and masked: an encoder looks both ways."""

    input_ids: Tensor  # [rows, tokens], or [rows, 2, tokens] where the texts are read apart
    mask: Tensor  # of the same shape; 1 where there is a token
    segments: Tensor | None  # [rows, tokens]
    labels: Tensor  # [rows]
    num_tokens: int  # tokens without padding


def collate_pairs(pairs: Sequence[EncodedPair], pad_id: int, device: torch.device) -> PairBatch:
    """Pads sequences, see `fedsim.training.padding`."""
    ids, mask = _padded([text for pair in pairs for text in _sequences(pair)], pad_id)
    if pairs[0].split:
        ids, mask = (array.reshape(len(pairs), -1, array.shape[1]) for array in (ids, mask))
    return PairBatch(
        on_device(torch.from_numpy(ids), device),
        on_device(torch.from_numpy(mask), device),
        on_device(torch.from_numpy(_padded([pair.segments for pair in pairs], 0)[0]), device) if len(pairs[0].segments) else None,
        on_device(torch.tensor([pair.label for pair in pairs]), device),
        sum(pair.num_tokens for pair in pairs),
    )


def _sequences(pair: EncodedPair) -> list[Tokens]:
    return [pair.input_ids[: pair.split], pair.input_ids[pair.split :]] if pair.split else [pair.input_ids]


def _padded(rows: Sequence[Tokens], value: int) -> tuple[Any, Any]:
    """Returns the rows as one array, and another that is 1 where they have an entry: [rows, entries] each."""
    filled = np.full((len(rows), padded_width(len(rows), max(map(len, rows)))), value, dtype=np.int64)
    there = np.zeros_like(filled)
    for place, row in enumerate(rows):
        filled[place, : len(row)], there[place, : len(row)] = row, 1
    return filled, there


def label_logits(model: nn.Module, batch: PairBatch) -> Tensor:
    """Returns the logits of the labels, [rows, labels] float32."""
    told = {} if batch.segments is None else {"token_type_ids": batch.segments}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.mask, **told).logits
    return logits.float()


def label_losses(model: nn.Module, batch: PairBatch) -> Tensor:
    """Returns the cross-entropy of each row's label: [rows], float32."""
    return functional.cross_entropy(label_logits(model, batch), batch.labels, reduction="none")

"""Encodes one or two texts with a label for an encoder with a classification head, and computes the loss of a row.

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

from fedsim.config import DataConfig
from fedsim.training.encoding import encode, token_ids, tokenized
from fedsim.training.padding import padded_width
from fedsim.training.stack import on_device
from fedsim.types import AnyEncoded, AnyExample, EncodedLabelled, Example, Labelled, Tokens


def encode_any(examples: Sequence[AnyExample], tokenizer: Any, data: DataConfig, *, apart: bool = False) -> list[AnyEncoded]:
    """Returns the tokens of examples of one kind, answered or classified; two texts are encoded `apart` or as one sequence."""
    labelled = [example for example in examples if isinstance(example, Labelled)]
    if labelled:
        return [*encode_labelled(labelled, tokenizer, data.max_length, apart=apart)]
    return [*encode([example for example in examples if isinstance(example, Example)], tokenizer, data.max_length, data.train_on)]


def encode_labelled(examples: Sequence[Labelled], tokenizer: Any, max_length: int, *, apart: bool = False) -> list[EncodedLabelled]:
    """Returns the tokens of each example's one or two texts, truncated to `max_length` or to the tokenizer's own limit.

    Of two texts the longer one is cut. All examples must have the same number of texts. With `apart`, each text is a sequence of its
    own, of at most its share of `max_length`.
    """
    if not examples:
        return []
    texts = list(zip(*(each.texts for each in examples), strict=True))
    limit = min(max_length // len(texts) if apart else max_length, tokenizer.model_max_length)
    labels = [each.labels.index(each.answer) for each in examples]
    if apart:
        sequences = zip(*(token_ids(tokenizer, column, truncation=True, max_length=limit) for column in texts), strict=True)
        return [
            EncodedLabelled(_array([*first, *chain(*second)]), _array([]), label, split=len(first) if second else 0)
            for (first, *second), label in zip(sequences, labels, strict=True)
        ]
    rows = (row for found in tokenized(tokenizer, *texts, truncation="longest_first", max_length=limit) for row in _rows(found))
    return [EncodedLabelled(_array(ids), _array(segments), label) for (ids, segments), label in zip(rows, labels, strict=True)]


def _rows(found: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Returns tokens and segments of each row of a tokenizer's output; no segments if the model takes none."""
    ids = found["input_ids"]
    return zip(ids, found.get("token_type_ids", [[]] * len(ids)), strict=True)


def _array(ids: list[int]) -> Tokens:
    return np.array(ids, dtype=np.int32)


@dataclass(frozen=True)
class LabelledBatch:
    """Padded tensors of a pass. Padding is on the right and masked, since an encoder attends both ways."""

    input_ids: Tensor  # [rows, tokens], or [rows, 2, tokens] if the texts are encoded apart
    mask: Tensor  # of the same shape; 1 for a token, 0 for padding
    segments: Tensor | None  # [rows, tokens]
    labels: Tensor  # [rows]
    num_tokens: int  # tokens without padding


def collate_labelled(examples: Sequence[EncodedLabelled], pad_id: int, device: torch.device) -> LabelledBatch:
    """Pads sequences, see `fedsim.training.padding`."""
    ids, mask = _padded([text for each in examples for text in _sequences(each)], pad_id)
    if examples[0].split:
        ids, mask = (array.reshape(len(examples), -1, array.shape[1]) for array in (ids, mask))
    return LabelledBatch(
        on_device(torch.from_numpy(ids), device),
        on_device(torch.from_numpy(mask), device),
        on_device(torch.from_numpy(_padded([each.segments for each in examples], 0)[0]), device) if len(examples[0].segments) else None,
        on_device(torch.tensor([each.label for each in examples]), device),
        sum(each.num_tokens for each in examples),
    )


def _sequences(example: EncodedLabelled) -> list[Tokens]:
    return [example.input_ids[: example.split], example.input_ids[example.split :]] if example.split else [example.input_ids]


def _padded(rows: Sequence[Tokens], value: int) -> tuple[Any, Any]:
    """Returns the padded rows and their mask, 1 for an entry: [rows, entries] each."""
    filled = np.full((len(rows), padded_width(len(rows), max(map(len, rows)))), value, dtype=np.int64)
    present = np.zeros_like(filled)
    for place, row in enumerate(rows):
        filled[place, : len(row)], present[place, : len(row)] = row, 1
    return filled, present


def label_logits(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """Returns the logits of the labels, [rows, labels] float32."""
    optional = {} if batch.segments is None else {"token_type_ids": batch.segments}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.mask, **optional).logits
    return logits.float()


def label_losses(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """Returns the cross-entropy of each row's label: [rows], float32."""
    return functional.cross_entropy(label_logits(model, batch), batch.labels, reduction="none")

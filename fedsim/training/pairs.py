"""Two texts and a label, for an encoder with a classification head: from text to tokens, and the loss of a row.

As for generated answers, no row's loss depends on another row: it is the cross-entropy of its own label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.types import EncodedPair, Pair


def encode_pair(pair: Pair, tokenizer: Any, max_length: int) -> EncodedPair:
    """Returns both texts in the form of the tokenizer, cut from the longer one to `max_length` or to the tokenizer's own limit."""
    limit = min(max_length, tokenizer.model_max_length)
    found = tokenizer(pair.premise, pair.hypothesis, truncation="longest_first", max_length=limit, verbose=False)
    return EncodedPair(tuple(found["input_ids"]), tuple(found.get("token_type_ids", ())), pair.labels.index(pair.answer))


@dataclass(frozen=True)
class PairBatch:
    """Padded tensors of a pass. Padding is on the right and masked: an encoder looks both ways."""

    input_ids: Tensor  # [rows, tokens]
    mask: Tensor  # [rows, tokens]; 1 where there is a token
    segments: Tensor | None  # [rows, tokens]
    labels: Tensor  # [rows]
    num_tokens: int  # tokens without padding


def collate_pairs(pairs: Sequence[EncodedPair], pad_id: int, device: torch.device) -> PairBatch:
    """Pads pairs to the longest one."""
    shape = (len(pairs), max(pair.num_tokens for pair in pairs))
    ids, mask, segments = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, pair in enumerate(pairs):
        ids[row, : pair.num_tokens], mask[row, : pair.num_tokens] = pair.input_ids, 1
        segments[row, : len(pair.segments)] = pair.segments
    return PairBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        torch.from_numpy(segments).to(device) if pairs[0].segments else None,
        torch.tensor([pair.label for pair in pairs], device=device),
        sum(pair.num_tokens for pair in pairs),
    )


def label_logits(model: nn.Module, batch: PairBatch) -> Tensor:
    """Returns the logits of the labels, [rows, labels] float32."""
    told = {} if batch.segments is None else {"token_type_ids": batch.segments}
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.mask, **told).logits
    return logits.float()


def label_losses(model: nn.Module, batch: PairBatch) -> Tensor:
    """Returns the cross-entropy of each row's label: [rows], float32."""
    return functional.cross_entropy(label_logits(model, batch), batch.labels, reduction="none")

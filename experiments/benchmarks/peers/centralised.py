"""Centralised training of the same tokens with the same adapter in a plain torch loop: the reference of every simulation."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.workloads import PAD, Subject
from fedsim.config import TrainingConfig
from fedsim.core.adapters import bound, factors
from fedsim.training.batches import Batch, collate, local_batches
from fedsim.training.budget import Load, TokenBudget
from fedsim.training.cohort import ClientData
from fedsim.types import EncodedExample


def train(on: Subject, clients: Sequence[ClientData], training: TrainingConfig) -> int:
    """Trains one adapter on the union of all clients' batches, step by step, and returns the number of tokens.

    Uses torch's AdamW, one loss per pass, rows sorted by length, and passes with as many tokens as a cohort's.
    """
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in factors(on.model, ("R",)).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=training.learning_rate, weight_decay=0.0, fused=True)
    plans = [local_batches(data.lengths, training, seed=0, round=1, client=data.client) for data in clients]
    num_tokens, tokens_per_pass = 0, TokenBudget.of(training, on.model, Load(on.spec, ("R",))).tokens
    with bound(on.model, leaves):
        for step in range(training.local_steps):
            rows = [cast(EncodedExample, data.examples[i]) for data, plan in zip(clients, plans, strict=True) for i in plan[step]]
            rows.sort(key=lambda example: -example.num_tokens)
            for start, stop in _passes(rows, tokens_per_pass):
                loss, seen = _loss(on, rows[start:stop])
                (loss * (stop - start) / len(rows)).backward()
                num_tokens += seen
            optimizer.step()
            optimizer.zero_grad()
    return num_tokens


def _passes(rows: Sequence[EncodedExample], tokens_per_pass: int) -> list[tuple[int, int]]:
    cuts, start = [], 0
    while start < len(rows):
        stop = min(len(rows), start + max(1, tokens_per_pass // rows[start].num_tokens))
        cuts.append((start, stop))
        start = stop
    return cuts


def _loss(on: Subject, rows: Sequence[EncodedExample]) -> tuple[Tensor, int]:
    batch = collate(rows, PAD, next(on.model.parameters()).device)
    assert isinstance(batch, Batch)
    logits = on.model(input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100), batch.num_tokens

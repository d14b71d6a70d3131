"""Measures how exact a round's average was, how far the clients drifted apart, and how many directions the update has."""

from collections.abc import Iterator
from math import nan
from typing import Any

import torch
from torch import Tensor

from fedsim.core.collecting import Collected, Collector
from fedsim.core.forms import LORA_SB, AdapterSpec, Factors
from fedsim.core.global_state import GlobalState, dense_updates
from fedsim.types import Adapter

DENSE_SVD_LIMIT = 2048  # above this smaller side the singular values of a dense update are not computed


def diagnose(collector: Collector, collected: Collected, state: GlobalState, fold: Adapter, *, exact: bool) -> dict[str, Any]:
    """Returns {drift, effective_rank, deviation} of the round that led to this state. Effective rank is a mean over the layers.

    `deviation` is {} if the average is `exact` by construction. Otherwise it is {layer: |mean of updates - update of the round| /
    |mean of updates|}, or absent if the mean of the clients' dense updates is unknown. The update of the round is that of the state's
    factors plus `fold`, which the round added to the base weights.
    """
    found: dict[str, Any] = {"drift": collector.drift(), "effective_rank": _mean_effective_rank(state)}
    if exact:
        found["deviation"] = {}
    elif collected.products or collected.clients:
        folded = dense_updates(state.spec, fold, {}) if fold else {}
        found["deviation"] = {layer: _deviation(collected, state, folded, layer) for layer in state.spec.layers}
    return found


def _deviation(collected: Collected, state: GlobalState, folded: Adapter, layer: str) -> float:
    exact, update = collected.product(layer), state.spec.update(state.factors, layer)
    missed = exact - (update + folded[layer] if folded else update)
    norm = float(exact.norm())
    return float(missed.norm()) / norm if norm else nan


def _mean_effective_rank(state: GlobalState) -> float:
    ranks = [rank for values in _singular_values(state) for rank in effective_ranks(values).tolist()]
    return sum(ranks) / len(ranks) if ranks else nan


def _singular_values(state: GlobalState) -> Iterator[Tensor]:
    """Yields the singular values of the layers' updates up to a common factor, [layers, values], for layers of one shape at a time."""
    spec: AdapterSpec = state.spec
    if spec.form is LORA_SB and not state.folded:  # B and A are orthonormal
        yield singular_values(state.flat(("R",)).view(-1, spec.rank, spec.rank))
        return
    if spec.form.low_rank and not state.folded:
        cores = [_core(spec, spec.factors(state.factors, layer)) for layer in spec.layers]
        for shape in dict.fromkeys(core.shape for core in cores):
            yield singular_values(torch.stack([core for core in cores if core.shape == shape]))
        return
    for layer, sides in spec.layers.items():
        if min(sides) <= DENSE_SVD_LIMIT:
            dense = spec.update(state.factors, layer) + state.folded.get(layer, torch.zeros(()))
            yield singular_values(dense).unsqueeze(0)


def singular_values(matrices: Tensor) -> Tensor:
    """Returns ascending float64 singular values, [..., min(rows, columns)], of float32 matrices [..., rows, columns].

    They are the roots of the eigenvalues of the smaller Gram matrix in float64: right to 1e-8 of the largest (1e-7 at two thousand rows),
    while a decomposition in float32 is right to 1e-6 and takes up to two and a half times as long.
    """
    wide = matrices.double()
    wide = wide if wide.shape[-2] <= wide.shape[-1] else wide.mT
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0).sqrt()


def _core(spec: AdapterSpec, factors: Factors) -> Tensor:
    """Returns a small matrix with the singular values of a layer's update, without the scaling."""
    left, *middle, right = spec.form.chain(factors)
    core = torch.linalg.qr(left).R
    for matrix in middle:
        core = core @ matrix
    return core @ torch.linalg.qr(right.T).R.T


def effective_ranks(values: Tensor) -> Tensor:
    """Returns exp of the entropy of normalised singular values [..., values] (Roy and Vetterli 2007); nan if all are zero."""
    values = values.double()
    shares = values / values.sum(-1, keepdim=True)
    return torch.exp(-(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum(-1))

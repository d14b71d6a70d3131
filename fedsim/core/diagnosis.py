"""How exact a round's average was, how far the clients drifted apart, and how many directions the update has."""

from math import nan
from typing import Any

import torch
from torch import Tensor

from fedsim.config import MethodConfig
from fedsim.core.collecting import Collected, Collector
from fedsim.core.forms import LORA_SB, AdapterSpec
from fedsim.core.global_state import GlobalState
from fedsim.core.methods.method import Method
from fedsim.types import Adapter

DENSE_SVD_LIMIT = 2048  # above this smaller side the singular values of a dense update are not computed


def diagnose(method: Method, options: MethodConfig, collector: Collector, collected: Collected, state: GlobalState) -> dict[str, Any]:
    """Returns {drift, effective_rank, deviation} of a round; `deviation` is {layer: |mean of updates - update of the mean| / |mean of
    updates|} where the mean of the clients' dense updates is known, otherwise it is absent. Effective rank is a mean over the layers."""
    found: dict[str, Any] = {"drift": collector.drift(), "effective_rank": _mean_effective_rank(state)}
    if collected.products or collected.clients:
        missed = state.factors if method.name == "flexlora" else collected.factors
        found["deviation"] = {layer: _deviation(collected, missed, layer) for layer in collected.spec.layers}
    return found


def _deviation(collected: Collected, factors: Adapter, layer: str) -> float:
    exact = collected.product(layer)
    norm = float(exact.norm())
    return float((exact - collected.spec.update(factors, layer)).norm()) / norm if norm else nan


def _mean_effective_rank(state: GlobalState) -> float:
    ranks = [effective_rank(values) for layer in state.spec.layers if (values := _singular_values(state, layer)) is not None]
    return sum(ranks) / len(ranks) if ranks else nan


def _singular_values(state: GlobalState, layer: str) -> Tensor | None:
    spec: AdapterSpec = state.spec
    if not state.folded and spec.form is LORA_SB:
        return torch.linalg.svdvals(spec.scaling * state.factors[f"{layer}.R"])  # B and A are orthonormal
    if not state.folded:
        left, *middle, right = _padded(spec.form.chain(spec.factors(state.factors, layer)))
        if right is not None:
            core = torch.linalg.qr(left).R
            for matrix in middle:
                core = core @ matrix
            return torch.linalg.svdvals(core @ torch.linalg.qr(right.T).R.T)
    if min(spec.layers[layer]) > DENSE_SVD_LIMIT:
        return None
    return torch.linalg.svdvals(spec.update(state.factors, layer) + state.folded.get(layer, torch.zeros(())))


def _padded(chain: list[Tensor]) -> list[Any]:
    """A chain of one matrix has no right factor."""
    return chain if len(chain) > 1 else [chain[0], None]


def effective_rank(values: Tensor) -> float:
    """Returns exp of the entropy of the singular values' shares (Roy and Vetterli 2007); nan where all are zero."""
    total = float(values.sum())
    if not total > 0:
        return nan
    shares = values.double() / total
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))

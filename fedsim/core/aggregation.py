"""Server-side aggregation, one client at a time.

Fed-SB is exact: B and A are common, so sum_i p_i B R_i A = B (sum_i p_i R_i) A (arXiv 2502.15436).
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def weighted_mean(updates: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Returns sum_i w_i x_i / sum_i w_i over (w_i, x_i) as float32.

    Streaming: holds one float64 sum, whatever the number of clients; the order of arrival changes the result by less than float32 can show.
    Raises ValueError if there is no update or the weights sum to zero.
    """
    total: Tensor | None = None
    total_weight = 0.0
    for weight, update in updates:
        if total is None:
            total = torch.zeros(update.shape, dtype=torch.float64)
        total.add_(update, alpha=weight)
        total_weight += weight
    if total is None or total_weight <= 0:
        raise ValueError(f"Expected at least one client with a positive weight, got a total weight of {total_weight}.")
    return (total / total_weight).to(torch.float32)

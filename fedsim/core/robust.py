"""Aggregation that is robust to a few malicious or broken clients: median and trimmed mean of each parameter, and Krum.

Sources: Yin et al. 2018 (arXiv 1803.01498), Blanchard et al. 2017 (arXiv 1703.02757). All are unweighted, since a client's number of
examples is its own claim. They need all updates at once, [clients, parameters]; besides this stack they hold one chunk of parameters.
"""

from collections.abc import Iterator
from math import floor

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**20  # elements of the stack that are processed at a time: 4 MiB, times a few for copies and indices


def median(stack: Tensor) -> Tensor:
    """Returns the median over the clients of each parameter, [parameters]; for an even number, the mean of the middle two.

    Guarantees: within the range of the honest values while less than half of the clients are malicious; the order of clients does not
    matter. Raises ValueError for no clients, another type than float32 and values that are not finite.
    """
    middle, upper = (len(stack) - 1) // 2, len(stack) // 2
    sorted_chunks = (chunk.sort(dim=0).values for chunk in _chunks(stack))
    return torch.cat([values[middle] / 2 + values[upper] / 2 for values in sorted_chunks])  # halved first: the sum could overflow


def trimmed_mean(stack: Tensor, beta: float) -> Tensor:
    """Returns the mean of each parameter, [parameters], without the floor(beta clients) lowest and as many highest values.

    Guarantees: within the range of the honest values while at most that many clients are malicious; beta 0 is the mean.
    Raises ValueError unless 0 <= beta < 0.5, and for a stack as `median` does.
    """
    if not 0 <= beta < 0.5:
        raise ValueError(f"Expected 0 <= beta < 0.5, the part that is cut off at each end, got {beta}.")
    cut = floor(beta * len(stack) + 1e-9)  # 0.29 of 100 is 29
    kept = (chunk.sort(dim=0).values[cut : len(stack) - cut] for chunk in _chunks(stack))
    return torch.cat([values.mean(dim=0, dtype=torch.float64).to(torch.float32) for values in kept])


def krum(stack: Tensor, num_malicious: int, num_to_keep: int = 1) -> Tensor:
    """Returns the mean of the clients that `krum_selection` keeps, [parameters]: Krum if it keeps one, Multi-Krum if more.

    Raises ValueError as `krum_selection` does.
    """
    kept = krum_selection(stack, num_malicious, num_to_keep)
    return torch.cat([chunk[kept].mean(dim=0, dtype=torch.float64).to(torch.float32) for chunk in _chunks(stack)])


def krum_selection(stack: Tensor, num_malicious: int, num_to_keep: int = 1) -> list[int]:
    """Returns the rows of the clients with the lowest scores, best first; ties go to the earlier row.

    A client's score is the sum of its squared distances to its clients - num_malicious - 2 nearest others.
    Raises ValueError unless clients >= 2 num_malicious + 3, where the guarantee of Blanchard et al. ends, and unless
    1 <= num_to_keep <= clients - num_malicious, beyond which a malicious client is surely kept; for a stack as `median` does.
    """
    clients = len(stack)
    if num_malicious < 0 or clients < 2 * num_malicious + 3:
        raise ValueError(f"Expected num_malicious >= 0 and at least 2 num_malicious + 3 clients, got {num_malicious=} and {clients=}.")
    if not 1 <= num_to_keep <= clients - num_malicious:
        raise ValueError(f"Expected num_to_keep from 1 to {clients - num_malicious} of {clients} clients, got {num_to_keep}.")
    distances = _squared_distances(stack).fill_diagonal_(torch.inf)
    scores = distances.sort(dim=1).values[:, : clients - num_malicious - 2].sum(dim=1)
    kept: list[int] = scores.argsort(stable=True)[:num_to_keep].tolist()
    return kept


def _squared_distances(stack: Tensor) -> Tensor:
    """Returns float64 [clients, clients].

    Computed from differences: |x|^2 + |y|^2 - 2 x y would lose all digits of updates that are close together far from zero.
    """
    clients = len(stack)
    pairs = sum((functional.pdist(chunk.to("cpu", torch.float64)).square_() for chunk in _chunks(stack)), torch.tensor(0.0))
    upper = torch.zeros(clients, clients, dtype=torch.float64)
    upper[tuple(torch.triu_indices(clients, clients, offset=1))] = pairs
    return upper + upper.T


def _chunks(stack: Tensor) -> Iterator[Tensor]:
    """Yields the stack in groups of columns, each checked."""
    if stack.dtype != torch.float32 or stack.dim() != 2 or 0 in stack.shape:
        raise ValueError(f"Expected float32 [clients, parameters], at least one each, got {stack.dtype} {tuple(stack.shape)}.")
    for chunk in stack.split(max(1, CHUNK // len(stack)), dim=1):
        if not chunk.isfinite().all():
            raise ValueError("Expected finite updates, got NaN or infinity.")
        yield chunk

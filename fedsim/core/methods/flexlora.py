"""FlexLoRA (arXiv 2402.11505): the server averages the dense updates and hands out their truncated SVD, to each client its own rank.

The best approximation of rank r of the exact mean; exact only where the mean has no higher rank.
"""

import torch
from torch import Tensor

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.decomposition import truncated_svd
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method, Outcome
from fedsim.seeding import torch_generator
from fedsim.types import Adapter

NEGLIGIBLE = 1e-6
"""Singular values at most so large, of the largest one, are the rounding of float32 products: their directions mean nothing."""


def _best_of_rank(collected: Collected) -> Outcome:
    spec = collected.spec
    factors: Adapter = {}
    for layer in spec.layers:
        left, values, right = truncated_svd(collected.product(layer), spec.rank, collected.seed, layer)
        values = values.where(values > NEGLIGIBLE * values[0], 0.0)
        right = _completed(right[: values.count_nonzero()], spec.rank, collected, layer)
        factors |= {f"{layer}.B": left * values / spec.scaling, f"{layer}.A": right}
    return Outcome(factors, {})


def _completed(rows: Tensor, rank: int, collected: Collected, layer: str) -> Tensor:
    """Returns orthonormal rows [rank, in], these first; the others, which B gives no weight yet, come from seed and round.

    A mean of lower rank has no rows of its own to go on with, and what the SVD gives for them follows the last bits.
    """
    missing = rank - len(rows)
    if not missing:
        return rows
    generator = torch_generator(collected.seed, "flexlora", layer, collected.round)
    fresh = torch.randn(missing, rows.shape[1], generator=generator, dtype=torch.float64)
    fresh -= fresh @ rows.double().T @ rows.double()
    return torch.cat([rows, torch.linalg.qr(fresh.T).Q.T.float()])


FLEXLORA = Method(
    name="flexlora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B", "A"),),
    finish=_best_of_rank,
    exact=False,
    products=True,
    ranks=True,
    linear=False,
    lasting=False,
)

"""FlexLoRA (arXiv 2402.11505): the server averages the dense updates and sends out their truncated SVD, to each client at its own rank.

It is the best approximation of rank r of the exact mean; exact only if the mean has no higher rank.
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
"""Singular values up to this fraction of the largest are rounding errors of float32 products, with meaningless directions."""


def _best_of_rank(collected: Collected) -> Outcome:
    spec = collected.spec
    factors: Adapter = {}
    for layer in spec.layers:
        left, values, right = truncated_svd(collected.product(layer), spec.rank, collected.seed, layer)
        values = values.where(values > NEGLIGIBLE * values[0], 0.0)
        right = _with_random_rows(right[: values.count_nonzero()], spec.rank, collected, layer)
        factors |= {f"{layer}.B": left * values / spec.scaling, f"{layer}.A": right}
    return Outcome(factors, {})


def _with_random_rows(rows: Tensor, rank: int, collected: Collected, layer: str) -> Tensor:
    """Returns orthonormal rows [rank, in]: first `rows`, then random ones from seed and round, which B weights with zero.

    A mean of lower rank determines no further rows, and those of the SVD depend on rounding.
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

"""FedSVD (arXiv 2505.12805): A is frozen within a round; the server averages B and then re-factors B A by its SVD.

A becomes the right singular vectors, B the left ones times the singular values: B A does not change, and A gets orthonormal rows.
"""

import torch

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method, Outcome
from fedsim.types import Adapter


def _refactor(collected: Collected) -> Outcome:
    factors: Adapter = {}
    for layer in collected.spec.layers:
        B, A = (collected.factors[f"{layer}.{kind}"].double() for kind in "BA")
        (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        u, s, vt = torch.linalg.svd(upper @ lower.T)
        factors |= {f"{layer}.B": (left @ u * s).float(), f"{layer}.A": (vt @ right.T).float().contiguous()}
    return Outcome(factors, {})


FEDSVD = Method(
    name="fedsvd",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B",),),
    finish=_refactor,
    recomputed=("A",),
    lasting=False,
)

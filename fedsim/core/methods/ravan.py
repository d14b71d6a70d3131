"""RAVAN (arXiv 2506.05568): h heads H_k of r x r between frozen, mutually orthogonal B_k and A_k; the update is sum_k s_k B_k H_k A_k.

The scales s_k are trained with the heads and folded into the upload s_k H_k, so the server's average of the heads is exact; s starts at one
in every round. A client may train only some of the heads (`method.client_heads`): each head is averaged over the clients that trained it.
"""

import torch

from fedsim.choices import Init
from fedsim.core.forms import RAVAN as FORM
from fedsim.core.methods.method import Method
from fedsim.types import Adapter


def _fold_scales(adapter: Adapter) -> Adapter:
    folded = {}
    for name, tensor in adapter.items():
        layer, _, kind = name.rpartition(".")
        if kind == "H":
            folded[name] = adapter[f"{layer}.s"][:, None, None] * tensor
        else:
            folded[name] = torch.ones_like(tensor) if kind == "s" else tensor
    return folded


RAVAN = Method(
    name="ravan",
    form=FORM,
    inits=(Init.orthogonal,),
    turns=(("H", "s"),),
    local=("s",),
    before_upload=_fold_scales,
)

"""The product of a matrix with rows of tokens, by the fastest library on the device. No gradients: see `fedsim.core.products`.

On a CPU, PyTorch multiplies float32 with MKL, which uses AVX-512 on Intel processors only. oneDNN, which PyTorch also ships, uses it on
all: on an AMD EPYC (family 26) it is about twice as fast (`make bench ARGS="--only m"`). It rounds slightly more, because it sums longer
chains: the relative root mean square error of a product of random matrices is 4e-7 at a depth of 512, against 2.4e-7 with MKL.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

KERNEL_BYTES = 200_000_000
"""Approximate size of oneDNN's cache: the kernels of the last shapes and numbers of tokens, as many as `fedsim/__init__.py` sets."""


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """Returns x @ matrix.T, with `bias` [out] or with `onto` [tokens, out] added: [tokens, in] -> [tokens, out].

    `matrix` [out, in] may be the transposed view of another. `onto` may be overwritten with the result. Equal inputs give equal bits.
    """
    if is_for_onednn(x.dtype, x.device):
        if onto is None:
            return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, onto, matrix, bias, "add")
    return functional.linear(x, matrix, bias) if onto is None else torch.addmm(onto, x, matrix.T, out=onto)


def weight_gradient(deltas: Tensor, inputs: Tensor) -> Tensor:
    """Returns deltas.T @ inputs in float32, a weight's gradient: [tokens, out], [tokens, in] -> [out, in].

    On a GPU bfloat16 inputs are not cast: its bfloat16 units multiply exactly and add in float32, more than ten times as fast as its
    float32 units.
    """
    if deltas.device.type == "cuda" and deltas.dtype == inputs.dtype == torch.bfloat16:
        return torch.mm(deltas.T, inputs, out_dtype=torch.float32)
    return deltas.float().T @ inputs.float()


def is_for_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` uses oneDNN for this type and device."""
    return dtype == torch.float32 and device.type == "cpu" and has_onednn()


@cache
def has_onednn() -> bool:
    """Whether oneDNN and its AVX-512 kernels are available; checks for the operator too, as it is internal to torch.compile."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

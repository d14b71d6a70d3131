"""Initialisations of an adapter's factors, including the common bases B and A.

`gradient` (LoRA-SB, arXiv 2411.19557): B diag(S) A is the truncated SVD of the first full fine-tuning step dW = -eta sign(G), G the sum of
loss gradients over a few samples. With B^T B = A A^T = I the gradient on R is the projection of the full gradient, so it needs no
re-scaling. `weight_svd` (LoRA-XS, arXiv 2405.17604): top singular vectors of W, R near zero. `orthogonal`: random orthonormal bases from a
seed, R (or the heads H) zero. `lora`: A uniform from a seed, B zero (PEFT's start). `zero`: a dense update of zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.choices import Init
from fedsim.core.decomposition import CPU, truncated_svd
from fedsim.core.forms import HEAD, AdapterSpec
from fedsim.seeding import torch_generator
from fedsim.types import Adapter

NEAR_ZERO = 1e-5  # standard deviation of R on bases from the weights, as in LoRA-XS
HEAD_DEVIATION = 0.02  # standard deviation of a new classification head's weights, as in BERT


def from_gradients(spec: AdapterSpec, gradient: Callable[[str], Tensor], eta: float, seed: int, device: torch.device = CPU) -> Adapter:
    """Returns B, R = diag(S) / s and A of every layer from its summed gradient(layer) [out, in] and the first step size `eta`.

    Holds one layer's gradient at a time; `device` is that of `truncated_svd`.
    """
    adapter: Adapter = {}
    for name in spec.layers:
        left, values, right = truncated_svd(-eta * gradient(name).sign(), spec.rank, seed, name, device)
        adapter |= {f"{name}.B": left, f"{name}.R": torch.diag(values) / spec.scaling, f"{name}.A": right}
    return adapter


def from_noised_gradients(spec: AdapterSpec, gradient: Callable[[str], Tensor], seed: int, device: torch.device) -> Adapter:
    """Returns B and A from the singular vectors of the noised sum of clipped gradients, and R = 0.

    The first step's sign is not taken: it would make every entry's noise as large as the gradient. R is 0 because the singular values are
    mostly noise.
    """
    adapter: Adapter = {}
    for name in spec.layers:
        left, _, right = truncated_svd(gradient(name), spec.rank, seed, name, device)
        adapter |= {f"{name}.B": left, f"{name}.R": torch.zeros(spec.rank, spec.rank), f"{name}.A": right}
    return adapter


def from_weights(spec: AdapterSpec, weights: Adapter, seed: int) -> Adapter:
    """Returns B, A = top singular vectors of each base weight {layer: [out, in]}, and R drawn near zero."""
    adapter: Adapter = {}
    for name in spec.layers:
        left, _, right = truncated_svd(weights[name], spec.rank, seed, name)
        R = NEAR_ZERO * torch.randn(spec.rank, spec.rank, generator=torch_generator(seed, "weight_svd", name))
        adapter |= {f"{name}.B": left, f"{name}.R": R, f"{name}.A": right}
    return adapter


def from_seed(spec: AdapterSpec, weights: Adapter, seed: int) -> Adapter:
    """Returns random orthonormal B and A, different for every layer; R or the heads H are zero and their scales one."""
    adapter: Adapter = {}
    for name in spec.layers:
        shapes = spec.shapes(name)
        generator = torch_generator(seed, "orthogonal", name)
        left = torch.linalg.qr(torch.randn(shapes["B"], generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(shapes["A"][::-1], generator=generator, dtype=torch.float64)).Q.T
        for kind, shape in shapes.items():
            adapter[f"{name}.{kind}"] = torch.ones(shape) if kind == "s" else torch.zeros(shape)
        adapter |= {f"{name}.B": left.float().contiguous(), f"{name}.A": right.float().contiguous()}
    return adapter


def lora(spec: AdapterSpec, weights: Adapter, seed: int) -> Adapter:
    """Returns A uniform within +-1/sqrt(in), different for every layer, and B = 0, so that training starts at the base model."""
    adapter: Adapter = {}
    for name in spec.layers:
        shapes = spec.shapes(name)
        uniform = torch.rand(shapes["A"], generator=torch_generator(seed, "lora", name))
        adapter |= {f"{name}.B": torch.zeros(shapes["B"]), f"{name}.A": (2 * uniform - 1) / shapes["A"][1] ** 0.5}
    return adapter


def zero(spec: AdapterSpec, weights: Adapter, seed: int) -> Adapter:
    """Returns zeros for every factor of the form."""
    layout = spec.layout(spec.form.kinds)
    return {name: torch.zeros(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}


def new_head(spec: AdapterSpec, seed: int) -> Adapter:
    """Returns the start of a classification head: normal weights, different for every layer, and zero biases. Empty without a head."""
    adapter: Adapter = {}
    for name, (rows, columns) in spec.head.items():
        weight = HEAD_DEVIATION * torch.randn(rows, columns, generator=torch_generator(seed, HEAD, name))
        adapter[f"{name}.{HEAD}"] = torch.cat([weight, torch.zeros(rows, 1)], dim=1)
    return adapter


DERIVED: dict[Init, Callable[[AdapterSpec, Adapter, int], Adapter]] = {
    Init.weight_svd: from_weights,
    Init.orthogonal: from_seed,
    Init.lora: lora,
    Init.zero: zero,
}
"""Initialisations from base weights and seed alone: every party derives the same, and nothing is sent."""

"""Where the common bases B and A come from (LoRA-SB, arXiv 2411.19557; LoRA-XS, arXiv 2405.17604).

`gradient`: B diag(S) A is the truncated SVD of the first full fine-tuning step dW = -eta sign(G), G the sum of loss gradients over a
few samples. With B^T B = A A^T = I the gradient on R is the projection of the full gradient, so it needs no re-scaling.
`weight_svd`: top singular vectors of W, R = 0. `orthogonal`: random orthonormal bases from a seed, R = 0.
"""

import torch
from torch import Tensor

from fedsim.core.adapters import LoRASBLinear, weight_matrix
from fedsim.seeding import torch_generator
from fedsim.types import Adapter

EXACT_SVD_LIMIT = 2048  # above this smaller side a seeded subspace iteration takes the place of the full SVD
TOLERANCE = 1e-5  # largest entry of |B^T B - I| and |A A^T - I| in float32


def from_gradients(layers: dict[str, LoRASBLinear], gradients: Adapter, eta: float, seed: int) -> Adapter:
    """Returns B, R = diag(S) / s and A of every layer from the summed weight gradients {layer: [out, in]} and the first step size `eta`."""
    adapter: Adapter = {}
    for name, layer in layers.items():
        left, values, right = truncated_svd(-eta * gradients[name].sign(), layer.R.shape[-1], seed, name)
        adapter |= {f"{name}.B": left, f"{name}.R": torch.diag(values) / layer.scaling, f"{name}.A": right}
    return adapter


def from_weights(layers: dict[str, LoRASBLinear], seed: int) -> Adapter:
    """Returns B, A = top singular vectors of each base weight and R = 0, so that training starts exactly at the base model."""
    adapter: Adapter = {}
    for name, layer in layers.items():
        left, _, right = truncated_svd(weight_matrix(layer.base), layer.R.shape[-1], seed, name)
        adapter |= _with_zero_r(name, left, right)
    return adapter


def from_seed(layers: dict[str, LoRASBLinear], seed: int) -> Adapter:
    """Returns random orthonormal B, A, other ones for every layer, and R = 0."""
    adapter: Adapter = {}
    for name, layer in layers.items():
        generator = torch_generator(seed, "orthogonal", name)
        left = torch.linalg.qr(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(layer.A.T.shape, generator=generator, dtype=torch.float64)).Q.T
        adapter |= _with_zero_r(name, left.float().contiguous(), right.float().contiguous())
    return adapter


def _with_zero_r(name: str, left: Tensor, right: Tensor) -> Adapter:
    rank = left.shape[1]
    return {f"{name}.B": left, f"{name}.R": torch.zeros(rank, rank), f"{name}.A": right}


def truncated_svd(matrix: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [m, rank], S [rank], V^T [rank, n] on the CPU in float32, with orthonormal U and V to `TOLERANCE`.

    Deterministic: computed in float64 on the CPU, signs fixed so that the largest entry of each column of U is positive. Where the
    smaller side exceeds `EXACT_SVD_LIMIT` the subspace is found by iteration from a start that depends on `seed` and `name` only.
    """
    work = matrix.detach().to("cpu", torch.float64)
    if min(work.shape) <= EXACT_SVD_LIMIT:
        u, s, vt = torch.linalg.svd(work, full_matrices=False)
    else:
        u, s, vt = _subspace_svd(work, rank, seed, name)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = torch.gather(u, 0, u.abs().argmax(0, keepdim=True)).sign()
    left, right = (u * signs).float().contiguous(), (vt * signs.T).float().contiguous()
    check_orthonormal(name, left, right)
    return left, s.float(), right


def _subspace_svd(matrix: Tensor, rank: int, seed: int, name: str, iterations: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    width = min(rank + 32, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch_generator(seed, "svd", name), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt


def check_orthonormal(name: str, left: Tensor, right: Tensor) -> None:
    """Raises ValueError unless B^T B and A A^T are the identity to `TOLERANCE`."""
    identity = torch.eye(left.shape[1], dtype=torch.float64)
    worst = max((left.double().T @ left.double() - identity).abs().max(), (right.double() @ right.double().T - identity).abs().max())
    if not worst <= TOLERANCE:
        raise ValueError(f"Expected orthonormal bases for {name!r}, got a deviation of {worst:.1e} (at most {TOLERANCE:.0e}).")


def bases_of(adapter: Adapter) -> Adapter:
    """Returns the common factors B and A."""
    return {name: tensor for name, tensor in adapter.items() if not name.endswith(".R")}

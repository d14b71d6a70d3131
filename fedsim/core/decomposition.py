"""Truncated singular value decomposition in float64, exact or by subspace iteration.

The exact one takes the eigenvectors of the Gram matrix of the smaller side: in float64 these are right to all digits of float32, several
times faster than LAPACK's decomposition of the matrix itself, and on any device.
"""

import torch
from torch import Tensor

from fedsim.seeding import torch_generator

EXACT_SVD_LIMIT = 2048  # above this smaller side, a seeded subspace iteration replaces the exact decomposition
TOLERANCE = 1e-5  # largest entry of |B^T B - I| and |A A^T - I| in float32
OVERSAMPLING = 32  # columns of the subspace besides the rank
ITERATIONS = 6
CPU = torch.device("cpu")


def truncated_svd(matrix: Tensor, rank: int, seed: int, name: str, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [m, rank], S [rank], V^T [rank, n] on the CPU in float32, with orthonormal U and V to `TOLERANCE`.

    Deterministic on one `device`; the last digits differ between devices. Signs are fixed so that the largest entry of each column of U is
    positive. If the smaller side exceeds `EXACT_SVD_LIMIT`, the subspace iteration starts from a matrix that depends on `seed` and `name`
    only. Vectors beyond the rank of the matrix are arbitrary orthonormal ones. A rank above the smaller side gives all singular values.
    """
    given = matrix.detach().to(device).double()
    if min(matrix.shape) > EXACT_SVD_LIMIT:
        left, values, right = _subspace_svd(given, rank, seed, name)
    else:
        left, values, right = exact_svd(given, rank)
    signs = torch.gather(left, 0, left.abs().argmax(0, keepdim=True)).sign()
    left, right = (left * signs).float().cpu().contiguous(), (right * signs.T).float().cpu().contiguous()
    check_orthonormal(name, left, right)
    return left, values.float().cpu(), right


def exact_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U [m, k], S [k], V^T [k, n] of the k = min(rank, m, n) largest singular values of a float64 matrix, on its device.

    U and V are orthonormal to rounding. Values down to 1e-7 of the largest are right to about 1e-9 of it; smaller ones are noise.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = exact_svd(matrix.T, rank)
        return left.T, values, right.T
    rank = min(rank, matrix.shape[1])
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1) if rank else matrix.new_empty(matrix.shape[1], 0)
    left, upper = torch.linalg.qr(matrix @ vectors)  # the product is U S: its columns are already orthogonal, except those near zero
    values = upper.diagonal()
    return left * torch.where(values < 0, -1.0, 1.0), values.abs(), vectors.T


def svd_flops(rows: int, columns: int, rank: int) -> float:
    """Returns the approximate float64 operations of `truncated_svd`, with everything expressed in terms of matrix products."""
    short, long = sorted((rows, columns))
    if short > EXACT_SVD_LIMIT:
        return 60.0 * rows * columns * (rank + OVERSAMPLING)
    return 2.0 * long * short**2 + 20.0 * short**3


def _subspace_svd(matrix: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch_generator(seed, "svd", name), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = exact_svd(basis.T @ matrix, rank)
    return basis @ left, values, right


def check_orthonormal(name: str, left: Tensor, right: Tensor) -> None:
    """Raises ValueError unless B^T B and A A^T are the identity to `TOLERANCE`."""
    identity = torch.eye(left.shape[1], dtype=torch.float64)
    worst = max((left.double().T @ left.double() - identity).abs().max(), (right.double() @ right.double().T - identity).abs().max())
    if not worst <= TOLERANCE:
        raise ValueError(f"Expected orthonormal bases for {name!r}, got a deviation of {worst:.1e} (at most {TOLERANCE:.0e}).")

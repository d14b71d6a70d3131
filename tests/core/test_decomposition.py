import numpy as np
import pytest
import torch

from fedsim.core import decomposition
from fedsim.core.decomposition import TOLERANCE, check_orthonormal, exact_svd, truncated_svd


def random_matrix(rows, columns, values, seed=0):
    """Returns a float64 matrix with these singular values, and its singular vectors."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.normal(size=(rows, len(values))))[0]
    right = np.linalg.qr(generator.normal(size=(columns, len(values))))[0]
    return torch.from_numpy(left * values @ right.T), left, right


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (1, 7), (7, 1)])
def test_the_exact_decomposition_equals_lapacks(shape):
    matrix = np.random.default_rng(1).normal(size=shape)
    rank = min(6, *shape)
    left, values, right = (part.numpy() for part in exact_svd(torch.from_numpy(matrix), rank))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(values, s[:rank], rtol=1e-12)
    np.testing.assert_allclose(left * values @ right, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-12)
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-12)


def test_small_singular_values_are_accurate_down_to_float32_precision():
    wanted = np.array([1.0, 0.3, 1e-2, 1e-4, 1e-6, 1e-7])
    matrix, left, right = random_matrix(50, 20, wanted)
    u, s, vt = (part.numpy() for part in exact_svd(matrix, 6))
    np.testing.assert_allclose(s, wanted, atol=1e-9)
    assert np.abs(u * s @ vt - matrix.numpy()).max() < 1e-9
    overlap = np.abs((u * left).sum(0) * (vt.T * right).sum(0))
    np.testing.assert_allclose(overlap[:5], np.ones(5), atol=1e-5)


@pytest.mark.parametrize("wanted", [[2.0, 1.0], [1.0, 1.0], []])
def test_beyond_the_rank_of_a_matrix_values_are_zero_and_vectors_orthonormal(wanted):
    matrix, _, _ = random_matrix(20, 12, np.array(wanted))
    u, s, vt = exact_svd(matrix, 8)
    assert s[: len(wanted)].tolist() == pytest.approx(wanted)
    assert s[len(wanted) :].max() < 1e-12
    for product in (u.T @ u, vt @ vt.T):
        torch.testing.assert_close(product, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_rank_above_the_smaller_side_gives_the_full_decomposition():
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    left, values, right = truncated_svd(matrix, 100, 0, "x")
    assert (left.shape, values.shape, right.shape) == ((9, 5), (5,), (5, 5))
    torch.testing.assert_close(left * values @ right, matrix, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_extreme_float32_scales_neither_overflow_nor_underflow_in_the_gram_matrix(scale):
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    left, values, right = truncated_svd(matrix, 3, 0, "x")
    scaled = truncated_svd(scale * matrix, 3, 0, "x")
    torch.testing.assert_close((scaled[0], scaled[1] / scale, scaled[2]), (left, values, right), rtol=1e-5, atol=1e-5)


def test_the_largest_entry_of_every_left_vector_is_positive():
    left, _, _ = truncated_svd(torch.randn(30, 20, generator=torch.Generator().manual_seed(2)), 10, 0, "x")
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_iterative_decomposition_of_a_large_matrix_agrees_with_the_exact_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(60, 8, generator=generator) @ torch.randn(8, 50, generator=generator)
    matrix = low + 0.01 * torch.randn(60, 50, generator=generator)
    exact = truncated_svd(matrix, 4, 0, "x")
    monkeypatch.setattr(decomposition, "EXACT_SVD_LIMIT", 10)
    monkeypatch.setattr(decomposition, "exact_svd", limited_to(10 + 32, decomposition.exact_svd))
    torch.testing.assert_close(truncated_svd(matrix, 4, 0, "x"), exact, rtol=1e-4, atol=1e-4)


def limited_to(side, decompose):
    def checked(matrix, rank):
        assert min(matrix.shape) <= side
        return decompose(matrix, rank)

    return checked


def test_bases_that_are_not_orthonormal_are_refused():
    with pytest.raises(ValueError, match="orthonormal bases for 'layer'"):
        check_orthonormal("layer", torch.eye(4) * (1 + 100 * TOLERANCE), torch.eye(4))


def test_truncated_svd_refuses_a_decomposition_that_is_not_orthonormal(monkeypatch):
    monkeypatch.setattr(decomposition, "exact_svd", lambda *_: (torch.eye(4) * 1.001, torch.ones(4), torch.eye(4)))
    with pytest.raises(ValueError, match="orthonormal bases for 'layer'"):
        truncated_svd(torch.eye(4), 2, 0, "layer")

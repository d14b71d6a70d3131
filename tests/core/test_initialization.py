import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from fedsim.core import initialization
from fedsim.core.adapters import adapt, adapted_layers, weight_matrix
from fedsim.core.initialization import TOLERANCE, check_orthonormal, from_gradients, from_seed, from_weights, truncated_svd
from fedsim.core.payload import digest


def layers(architecture="llama", rank=8):
    model = tiny_model(architecture)
    adapt(model, rank, 0.5, [])
    return adapted_layers(model)


def random_gradients(of):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(weight_matrix(layer.base).shape, generator=generator) for name, layer in of.items()}


def assert_orthonormal(adapter, rank=8):
    identity = torch.eye(rank)
    for name, tensor in adapter.items():
        product = {"B": tensor.T @ tensor, "A": tensor @ tensor.T}.get(name[-1], identity)
        assert (product - identity).abs().max() <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bases_of_every_initialization_are_orthonormal(architecture):
    of = layers(architecture)
    for adapter in (from_seed(of, 0), from_weights(of, 0), from_gradients(of, random_gradients(of), 1e-3, 0)):
        assert_orthonormal(adapter)


def test_gradient_bases_are_the_best_approximation_of_the_first_full_step():
    of = layers()
    gradients, eta = random_gradients(of), 1e-3
    adapter = from_gradients(of, gradients, eta, 0)
    for name, layer in of.items():
        step = (-eta * gradients[name].sign()).double()
        u, s, vt = torch.linalg.svd(step, full_matrices=False)
        best = (u[:, :8] * s[:8]) @ vt[:8]
        found = layer.scaling * adapter[f"{name}.B"] @ adapter[f"{name}.R"] @ adapter[f"{name}.A"]
        torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-7)


def test_weight_bases_span_the_top_singular_directions_and_start_at_the_base_model():
    of = layers()
    adapter = from_weights(of, 0)
    for name, layer in of.items():
        u, _, _ = torch.linalg.svd(weight_matrix(layer.base).double(), full_matrices=False)
        overlap = torch.linalg.svdvals(u[:, :8].T @ adapter[f"{name}.B"].double())
        torch.testing.assert_close(overlap, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-5)
        assert not adapter[f"{name}.R"].any()


def test_seeded_bases_repeat_with_the_seed_and_differ_between_seeds_and_layers():
    of = layers()
    first = from_seed(of, 0)
    assert digest(first) == digest(from_seed(of, 0)) != digest(from_seed(of, 1))
    queries = [tensor for name, tensor in first.items() if name.endswith("q_proj.B")]
    assert not torch.equal(queries[0], queries[1])


def test_the_iterative_svd_of_a_large_matrix_agrees_with_the_full_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 8, generator=generator) @ torch.randn(8, 50, generator=generator) + 0.01 * torch.randn(
        60, 50, generator=generator
    )
    exact = truncated_svd(matrix, 4, 0, "x")
    monkeypatch.setattr(initialization, "EXACT_SVD_LIMIT", 10)
    torch.testing.assert_close(truncated_svd(matrix, 4, 0, "x"), exact, rtol=1e-4, atol=1e-4)


def test_bases_that_are_not_orthonormal_are_refused():
    with pytest.raises(ValueError, match="orthonormal bases for 'layer'"):
        check_orthonormal("layer", torch.eye(4) * 1.001, torch.eye(4))

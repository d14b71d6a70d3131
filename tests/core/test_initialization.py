import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from fedsim.core.adapters import adapt, base_weights
from fedsim.core.decomposition import TOLERANCE
from fedsim.core.forms import LORA, LORA_SB, RAVAN
from fedsim.core.initialization import from_gradients, from_seed, from_weights, lora
from fedsim.core.payload import digest


def spec_and_weights(architecture="llama", rank=8, form=LORA_SB, heads=1):
    model = tiny_model(architecture)
    return adapt(model, form, rank, heads, 0.5, []), base_weights(model)


def random_gradients(spec):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in spec.layers.items()}


def assert_orthonormal(adapter, rank=8):
    identity = torch.eye(rank)
    for name, tensor in adapter.items():
        product = {"B": tensor.T @ tensor, "A": tensor @ tensor.T}.get(name[-1], identity)
        assert (product - identity).abs().max() <= TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bases_of_every_initialization_are_orthonormal(architecture):
    spec, weights = spec_and_weights(architecture)
    for adapter in (
        from_seed(spec, weights, 0),
        from_weights(spec, weights, 0),
        from_gradients(spec, random_gradients(spec).__getitem__, 1e-3, 0),
    ):
        assert_orthonormal(adapter)


def test_gradient_bases_are_the_best_approximation_of_the_first_full_step():
    spec, _ = spec_and_weights()
    gradients, eta = random_gradients(spec), 1e-3
    adapter = from_gradients(spec, gradients.__getitem__, eta, 0)
    for name in spec.layers:
        step = (-eta * gradients[name].sign()).double()
        u, s, vt = torch.linalg.svd(step, full_matrices=False)
        best = (u[:, :8] * s[:8]) @ vt[:8]
        found = 0.5 * adapter[f"{name}.B"] @ adapter[f"{name}.R"] @ adapter[f"{name}.A"]
        torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-7)


def test_weight_bases_span_the_top_singular_directions_and_start_near_the_base_model():
    spec, weights = spec_and_weights()
    adapter = from_weights(spec, weights, 0)
    for name in spec.layers:
        u, _, _ = torch.linalg.svd(weights[name].double(), full_matrices=False)
        overlap = torch.linalg.svdvals(u[:, :8].T @ adapter[f"{name}.B"].double())
        torch.testing.assert_close(overlap, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-5)
        R = adapter[f"{name}.R"]
        assert 0.7e-5 < R.std() < 1.4e-5


def test_seeded_bases_repeat_with_the_seed_and_differ_between_seeds_and_layers():
    spec, weights = spec_and_weights()
    first = from_seed(spec, weights, 0)
    assert digest(first) == digest(from_seed(spec, weights, 0)) != digest(from_seed(spec, weights, 1))
    assert not any(tensor.any() for name, tensor in first.items() if name.endswith(".R"))
    queries = [tensor for name, tensor in first.items() if name.endswith("q_proj.B")]
    assert not torch.equal(queries[0], queries[1])


def test_heads_start_at_zero_between_mutually_orthogonal_bases():
    spec, weights = spec_and_weights(rank=4, form=RAVAN, heads=3)
    adapter = from_seed(spec, weights, 0)
    for name in spec.layers:
        B, A = adapter[f"{name}.B"], adapter[f"{name}.A"]
        assert (B.T @ B - torch.eye(12)).abs().max() <= TOLERANCE >= (A @ A.T - torch.eye(12)).abs().max()
        assert not adapter[f"{name}.H"].any()
        assert adapter[f"{name}.s"].eq(1).all()


def test_lora_starts_at_the_base_model_with_an_a_of_its_own_from_pefts_distribution_in_every_layer():
    spec, _ = spec_and_weights(form=LORA)
    adapter = lora(spec, {}, 0)
    for name, (_, columns) in spec.layers.items():
        assert not adapter[f"{name}.B"].any()
        oracle = torch.nn.init.kaiming_uniform_(torch.empty(400, columns), a=5**0.5, generator=torch.Generator().manual_seed(0))
        assert adapter[f"{name}.A"].abs().max() <= columns**-0.5
        assert float(adapter[f"{name}.A"].std()) == pytest.approx(float(oracle.std()), rel=0.2)
    queries = [tensor for name, tensor in adapter.items() if name.endswith("q_proj.A")]
    assert not torch.equal(queries[0], queries[1])

"""Drift, deviation and effective rank against NumPy on dense matrices."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.choices import Residual
from fedsim.config import MethodConfig
from fedsim.core import diagnosis
from fedsim.core.collecting import Collector
from fedsim.core.diagnosis import diagnose, effective_ranks, singular_values
from fedsim.core.exchange import Exchange
from fedsim.core.forms import DENSE, LORA, LORA_SB, RAVAN, AdapterSpec
from fedsim.core.global_state import GlobalState
from fedsim.core.initialization import from_seed
from fedsim.core.methods import METHODS

LAYERS = {"z": (9, 6), "a": (5, 8)}
WEIGHTS = [3.0, 1.0, 6.0]
P = np.array(WEIGHTS) / sum(WEIGHTS)


def factors_of(spec, seed, scale=1.0):
    layout = spec.layout(spec.kinds)
    return layout.unpack(scale * torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(seed)))


def spec_of(form, rank=3):
    return AdapterSpec(form, LAYERS, rank, heads=2 if form is RAVAN else 1, scaling=0.5)


def collected(name, options=None, *, ranks=(None,) * 3, exact=None, **keep):
    """Collects three clients' uploads of all trained kinds and diagnoses them; `exact` defaults to the method's own."""
    options, method = options or MethodConfig(), METHODS[name]
    spec, kinds = spec_of(method.form), method.uploaded(1)
    start, collector = factors_of(spec, 0), None
    collector = Collector(spec, kinds, start, spec.pack(start, kinds), options, **keep)
    flats = [spec.pack(factors_of(spec, seed), kinds) for seed in (1, 2, 3)]
    places = [spec.block(kinds, rank) if rank else None for rank in ranks]
    for weight, flat, positions in zip(WEIGHTS, flats, places, strict=True):
        collector.add(weight, flat if positions is None else flat[positions], positions)
    found = collector.collected(collector.mean(), 0, 1)
    outcome = method.finish(found)
    state = GlobalState(spec, outcome.factors, Exchange(dict.fromkeys((*spec.kinds, "W"), 0), frozenset()))
    if outcome.fold:
        state.fold(outcome.fold, 1)
    facts = diagnose(collector, found, state, outcome.fold, exact=method.exact if exact is None else exact)
    return spec, start, flats, places, state, facts


def dense_drift(start, flats, places):
    """Computes the drift with masks: an entry counts for the clients that sent it."""
    x = np.stack([flat.double().numpy() for flat in flats])
    masks = np.stack([np.ones(x.shape[1]) if each is None else np.isin(np.arange(x.shape[1]), each.numpy()) for each in places])
    held = P @ masks
    mean = np.where(held > 0, (P @ (masks * x)) / np.where(held > 0, held, 1), start)
    return math.sqrt(P @ (masks * (x - mean) ** 2).sum(1) / ((mean - start) ** 2).sum())


@pytest.mark.parametrize(("name", "ranks"), [("fed_sb", (None,) * 3), ("fedit", (None,) * 3), ("fed_sb", (1, 2, 3)), ("fed_sb", (1, 2, 2))])
def test_drift_is_the_spread_of_the_clients_divided_by_the_step_of_their_mean(name, ranks):
    spec, start, flats, places, _, facts = collected(name, ranks=ranks, keep_products=False)
    origin = spec.pack(start, METHODS[name].uploaded(1)).double().numpy()
    assert facts["drift"] == pytest.approx(dense_drift(origin, flats, places), rel=1e-5)


def test_drift_is_zero_for_equal_clients_and_nan_without_movement_or_clients():
    spec = spec_of(LORA)
    start = factors_of(spec, 0)
    for moved, expected in ((1.0, 0.0), (0.0, math.nan)):
        collector = Collector(spec, ("B", "A"), start, spec.pack(start, ("B", "A")), MethodConfig(), keep_products=False)
        for weight in WEIGHTS:
            collector.add(weight, spec.pack(start, ("B", "A")) + moved)
        assert collector.drift() == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert math.isnan(Collector(spec, ("B",), start, spec.pack(start, ("B",)), MethodConfig(), keep_products=False).drift()), (
        "nobody took part"
    )


def dense_mean(spec, flats, layer):
    adapters = [spec.layout(("B", "A")).unpack(flat.double()) for flat in flats]
    return sum(p * 0.5 * (own[f"{layer}.B"] @ own[f"{layer}.A"]).numpy() for p, own in zip(P, adapters, strict=True))


def relative_error(exact, update):
    return np.linalg.norm(exact - update.double().numpy()) / np.linalg.norm(exact)


def test_deviation_is_the_relative_error_of_the_mean_of_factors_against_the_mean_of_updates():
    spec, _, flats, _, _, facts = collected("fedit", keep_products=True)
    mean = spec.layout(("B", "A")).unpack(sum(float(p) * flat for p, flat in zip(P, flats, strict=True)))
    for layer in LAYERS:
        expected = relative_error(dense_mean(spec, flats, layer), spec.update(mean, layer))
        assert expected > 0.1
        assert facts["deviation"][layer] == pytest.approx(expected, rel=1e-5)


def test_diagnosis_does_not_depend_on_the_name_of_a_method(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["flexlora"], name="mine"))
    mine, flexlora = (collected(name, keep_products=True)[-1]["deviation"] for name in ("mine", "flexlora"))
    assert mine == flexlora


def test_deviation_of_flexlora_is_the_truncation_error():
    spec, _, flats, _, _, facts = collected("flexlora", keep_products=True)
    for layer in LAYERS:
        values = np.linalg.svd(dense_mean(spec, flats, layer), compute_uv=False)
        expected = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
        assert facts["deviation"][layer] == pytest.approx(expected, rel=1e-4)


def test_deviation_of_a_truncated_residual_is_the_truncation_error():
    spec, _, flats, _, _, facts = collected("fedex_lora", MethodConfig(residual_rank=2), exact=False, keep_products=True)
    mean = spec.layout(("B", "A")).unpack(sum(float(p) * flat.double() for p, flat in zip(P, flats, strict=True)))
    for layer in LAYERS:
        exact = dense_mean(spec, flats, layer)
        values = np.linalg.svd(exact - spec.update(mean, layer).numpy(), compute_uv=False)
        expected = np.linalg.norm(values[2:]) / np.linalg.norm(exact)
        assert expected > 0.01
        assert facts["deviation"][layer] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
@pytest.mark.parametrize("keep", [{"keep_products": True}, {"keep_products": False, "keep_clients": True}])
def test_residuals_folded_into_the_base_weights_leave_no_deviation(name, keep):
    assert collected(name, **keep)[-1]["deviation"] == {}
    measured = collected(name, exact=False, **keep)[-1]["deviation"]
    assert set(measured) == set(LAYERS)
    assert max(measured.values()) < 1e-6


def test_deviation_is_empty_for_an_exact_average_and_absent_when_not_measured():
    assert collected("fed_sb", keep_products=False)[-1]["deviation"] == {}
    assert "deviation" not in collected("fedit", keep_products=False)[-1]


def entropy_rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 1e-12 * values[0]] / values.sum()
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("form", [LORA_SB, LORA, RAVAN, DENSE], ids=lambda form: form.name)
def test_effective_rank_equals_that_of_the_dense_update(form):
    spec = spec_of(form, rank=2)
    factors = factors_of(spec, 5)
    if form is LORA_SB:  # whose bases are orthonormal
        factors = from_seed(spec, {}, 0) | {name: tensor for name, tensor in factors.items() if name.endswith(".R")}
    state = GlobalState(spec, factors, Exchange(dict.fromkeys((*spec.kinds, "W"), 0), frozenset()))
    expected = [entropy_rank(spec.update(state.factors, layer).double().numpy()) for layer in LAYERS]
    assert len({round(value, 3) for value in expected}) == 2
    assert diagnosis._mean_effective_rank(state) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("options", [MethodConfig(residual=Residual.stacked), MethodConfig(residual=Residual.dense)])
def test_effective_rank_includes_the_folded_update(options):
    keep = {"keep_products": options.residual is Residual.dense, "keep_clients": options.residual is Residual.stacked}
    spec, _, flats, _, _, facts = collected("fedex_lora", options, **keep)
    expected = np.mean([entropy_rank(dense_mean(spec, flats, layer)) for layer in LAYERS])
    assert facts["effective_rank"] == pytest.approx(expected, rel=1e-4)


def test_layers_too_large_for_a_dense_svd_are_left_out_of_the_effective_rank(monkeypatch):
    monkeypatch.setattr(diagnosis, "DENSE_SVD_LIMIT", 5)
    keep = {"keep_products": False, "keep_clients": True}
    spec, _, flats, _, _, facts = collected("fedex_lora", **keep)
    assert facts["effective_rank"] == pytest.approx(entropy_rank(dense_mean(spec, flats, "a")), rel=1e-4), "the layer of 5 x 8 alone"
    assert collected("fed_sb", keep_products=False)[-1]["effective_rank"] > 1, "factors need no dense matrix"


@given(st.integers(1, 8), st.floats(1e-3, 1e3))
def test_equal_singular_values_count_one_each_at_any_scale(count, scale):
    values = torch.cat([torch.full((count,), scale), torch.zeros(3)])
    assert float(effective_ranks(values)) == pytest.approx(count, rel=1e-5)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_effective_rank_is_at_least_one_and_at_most_the_number_of_values(values):
    found = float(effective_ranks(torch.tensor(values)))
    assert 1 - 1e-6 <= found <= len(values) + 1e-6
    assert found == pytest.approx(entropy_rank(np.diag(values)), rel=1e-4)


def test_the_effective_rank_of_a_zero_update_is_nan():
    assert math.isnan(effective_ranks(torch.zeros(4)))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 7, 40), (40, 7)])
@pytest.mark.parametrize("decades", [0, 3, 10])
def test_singular_values_are_accurate_to_1e_8_of_the_largest_at_any_decay(shape, decades):
    generator = np.random.default_rng(0)
    left, values, right = np.linalg.svd(generator.normal(size=shape), full_matrices=False)
    values = values * 10.0 ** -np.linspace(0, decades, values.shape[-1])
    matrices = ((left * values[..., None, :]) @ right).astype(np.float32)
    exact = np.linalg.svd(matrices.astype(float), compute_uv=False)[..., ::-1]
    found = singular_values(torch.from_numpy(matrices)).numpy()
    assert np.abs(found - exact).max() <= 1e-8 * exact.max()

"""Sketches against NumPy's products and the best approximations of known spectra."""

import numpy as np
import pytest
import torch

from fedsim.choices import FROM_GRADIENTS, Init
from fedsim.cli.main import main
from fedsim.config import AdapterConfig, Config
from fedsim.core.forms import LORA_SB, AdapterSpec
from fedsim.core.gradient_parts import WHOLE, Sketch, parts_of
from fedsim.core.initialization import DERIVED
from fedsim.errors import UserError

SKETCHED = Config(adapter=AdapterConfig(sketch=True))
SHAPES = [(120, 80), (80, 120), (90, 90)]
RANK = 4


def matrix_of(shape, spectrum, seed=0):
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.normal(size=(side, len(spectrum))))[0] for side in shape)
    return torch.from_numpy((left * spectrum) @ right.T).float()


def halves(sketch, matrix):
    """Sketches with NumPy, from the matrices that mix columns and rows."""
    omega, psi = (mixing.numpy() for mixing in sketch.mixing(torch.device("cpu")))
    return torch.from_numpy(matrix.numpy() @ omega), torch.from_numpy(psi @ matrix.numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_at_most_the_rank_is_reconstructed(shape):
    matrix = matrix_of(shape, [3.0, 2.0, 1.0, 0.5])
    sketch = Sketch.of(shape, RANK, seed=0)
    torch.testing.assert_close(sketch.whole(*halves(sketch, matrix)).float(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_reconstructing_a_falling_spectrum_is_within_the_proven_bound(shape):
    """Theorem 4.3 of Tropp and others, for k columns and l rows: the mean squared error is at most
    (1 + k / (l - k - 1)) (1 + j / (k - j - 1)) times the sum of squared singular values after the j-th, for the best j below k - 1."""
    spectrum = 0.7 ** np.arange(min(shape))
    matrix = matrix_of(shape, spectrum)
    narrow, wide = sorted((Sketch.of(shape, RANK, 0).columns, Sketch.of(shape, RANK, 0).rows))
    tails = [(1 + j / (narrow - j - 1)) * (spectrum[j:] ** 2).sum() for j in range(narrow - 1)]
    bound = (1 + narrow / (wide - narrow - 1)) * min(tails)
    errors = []
    for seed in range(100):
        sketch = Sketch.of(shape, RANK, seed)
        errors.append(float((sketch.whole(*halves(sketch, matrix)) - matrix).square().sum()))
    assert (spectrum[narrow:] ** 2).sum() < np.mean(errors) < bound


@pytest.mark.parametrize("shape", SHAPES)
def test_the_squared_norm_of_a_sketch_is_on_average_that_of_its_matrix(shape):
    matrix = matrix_of(shape, [1.0, 0.8, 0.2])
    lengths = []
    for seed in range(200):
        lengths.append(sum(float(half.square().sum()) for half in halves(Sketch.of(shape, RANK, seed), matrix)))
    assert np.mean(lengths) == pytest.approx(float(matrix.square().sum()), rel=4 * np.std(lengths) / 200**0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_tokens_are_the_sketch_of_the_gradient(shape):
    spec = AdapterSpec(LORA_SB, {"layer": shape}, RANK, 1, 1.0)
    parts = parts_of(SKETCHED, spec)
    deltas, inputs = torch.randn(30, shape[0]), torch.randn(30, shape[1])
    sums = {part: left.T @ right for part, left, right in parts.factored("layer", deltas, inputs)}
    assert list(sums) == list(parts.layout.names)
    for found, expected in zip(sums.values(), halves(parts.sketches["layer"], deltas.T @ inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = parts.whole(sums, "layer")
    assert whole.shape == shape


def test_layers_whose_sketch_is_more_than_half_as_large_are_sent_whole():
    spec = AdapterSpec(LORA_SB, {"wide": (200, 60), "small": (60, 60)}, 6, 1, 1.0)
    parts = parts_of(SKETCHED, spec)
    assert parts.layout.names == ("wide.columns", "wide.rows", "small")
    assert parts.layout.num_parameters == 17 * 200 + 34 * 60 + 60 * 60
    gradient = torch.randn(60, 60)
    assert parts.whole({"small": gradient}, "small") is gradient


def test_gradients_are_sketched_only_if_configured():
    spec = AdapterSpec(LORA_SB, {"wide": (200, 30), "small": (30, 30)}, 2, 1, 1.0)
    assert parts_of(Config(), spec).layout.names == ("wide", "small")
    deltas, inputs = torch.randn(3, 30), torch.randn(3, 30)
    ((name, left, right),) = WHOLE.factored("small", deltas, inputs)
    assert (name, left is deltas, right is inputs) == ("small", True, True)


def test_layers_of_one_shape_share_a_sketch_and_another_seed_mixes_differently():
    spec = AdapterSpec(LORA_SB, {"a": (120, 80), "b": (120, 80), "c": (80, 120)}, RANK, 1, 1.0)
    sketches = parts_of(SKETCHED, spec).sketches
    assert sketches["a"] is sketches["b"]
    cpu = torch.device("cpu")
    assert not torch.equal(sketches["a"].mixing(cpu)[0], Sketch.of((120, 80), RANK, 1).mixing(cpu)[0])


def test_a_rank_at_which_sketches_save_nothing_is_refused():
    spec = AdapterSpec(LORA_SB, {"layer": (60, 60)}, 16, 1, 1.0)
    with pytest.raises(UserError, match=r"adapter.sketch: at rank 16 no layer's sketch is half as large as its gradient"):
        parts_of(SKETCHED, spec)


def test_a_sketch_that_saves_nothing_is_refused_before_any_file_is_written(tmp_path, capsys):
    assert main(["run", "adapter.sketch=true", "data.train_examples=30", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "adapter.sketch: at rank 64 no layer's sketch is half as large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_init_is_from_gradients_or_derived():
    assert set(FROM_GRADIENTS) == set(Init) - set(DERIVED)

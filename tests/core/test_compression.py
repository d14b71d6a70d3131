from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedsim.core.compression import BLOCK, CODECS, compress

UNBIASED = ["bfloat16", "int8", "int4"]
LEVELS = {"int8": 127, "int4": 7}

finite = st.floats(min_value=-(2.0**127), max_value=2.0**127, width=32)
vectors = st.lists(finite, min_size=1, max_size=2 * BLOCK + 3).map(lambda values: torch.tensor(values, dtype=torch.float32))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def update(size=1000, seed=0):
    return torch.randn(size, generator=generator(seed)) * 1e-3


def round_trip(name, flat, seed=0, density=1.0):
    codec = CODECS[name]
    return codec.decode(codec.encode(flat, generator(seed), density), flat.numel(), density)


def spacing(name, flat):
    """An upper bound on the distance between the grid points around each value, from the formats and not from the code."""
    if name == "bfloat16":  # 7 bits after the leading one
        return 2.0 ** (flat.abs().double().clamp(min=2.0**-126).log2().floor() - 7)
    largest = torch.stack([block.abs().max() for block in flat.double().split(BLOCK) for _ in block])
    return (largest / LEVELS[name]).clamp(min=2.0**-126) * (1 + 2.0**-16)


def rounded_to_nearest(name, flat):
    step = spacing(name, flat)
    return flat.to(torch.bfloat16).float() if name == "bfloat16" else ((flat / step).round() * step).float()


def looks_unbiased(name, trials, flat):
    """Whether every entry's mean is within six standard errors of a rounding that goes up half of the time."""
    deviation = (trials.double().mean(dim=0) - flat).abs() / spacing(name, flat)
    return bool((deviation < 6 * 0.5 / len(trials) ** 0.5).all())


@pytest.mark.parametrize("name", UNBIASED)
def test_stochastic_rounding_passes_the_bias_check_and_rounding_to_nearest_fails_it(name):
    flat, random = update(400), generator()
    codec = CODECS[name]
    trials = torch.stack([codec.decode(codec.encode(flat, random), 400) for _ in range(2000)])
    assert looks_unbiased(name, trials, flat)
    assert not looks_unbiased(name, rounded_to_nearest(name, flat).expand(2000, -1), flat)
    assert not looks_unbiased(name, trials + 0.1 * spacing(name, flat), flat)


def test_averaging_over_many_clients_shrinks_the_rounding_error():
    flat = update()
    mean = torch.stack([round_trip("int4", flat, seed) for seed in range(400)]).mean(dim=0)
    assert (mean - flat).norm() < (round_trip("int4", flat) - flat).norm() / 15  # a twentieth by the square root of 400


@pytest.mark.parametrize("name", UNBIASED)
@settings(max_examples=60)
@given(flat=vectors)
def test_each_decoded_value_is_within_one_grid_step_of_the_original(name, flat):
    decoded = round_trip(name, flat)
    assert decoded.dtype == torch.float32
    assert decoded.shape == flat.shape
    assert ((decoded.double() - flat).abs() <= spacing(name, flat) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60)
@given(flat=vectors, density=st.floats(0.001, 1.0))
def test_encoded_arrays_match_shapes_and_num_bytes_for_any_values(name, flat, density):
    codec = CODECS[name]
    arrays = codec.encode(flat, generator(), density)
    assert {key: (array.dtype, tuple(array.shape)) for key, array in arrays.items()} == codec.shapes(flat.numel(), density)
    assert sum(len(array.numpy().tobytes()) for array in arrays.values()) == codec.num_bytes(flat.numel(), density)
    assert codec.decode(arrays, flat.numel(), density).isfinite().all()


def test_bytes_of_a_million_parameters():
    sizes = {name: codec.num_bytes(2**20, 0.01) / 2**20 for name, codec in CODECS.items()}
    assert sizes == pytest.approx({"bfloat16": 2, "int8": 1 + 1 / 64, "int4": 0.5 + 1 / 64, "top_k": 0.08}, rel=1e-4)


@settings(max_examples=60)
@given(flat=vectors, density=st.floats(0.001, 1.0))
def test_top_k_keeps_the_largest_exactly_and_nothing_else(flat, density):
    decoded = round_trip("top_k", flat, density=density)
    count = max(1, round(density * len(flat)))
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i].item()), i))
    expected = torch.zeros(len(flat))
    expected[order[:count]] = flat[order[:count]]
    assert torch.equal(decoded, expected)


def test_top_k_keeps_the_earlier_of_equal_magnitudes():
    assert round_trip("top_k", torch.tensor([1.0, -2.0, 2.0, -2.0, 2.0]), density=0.6).tolist() == [0, -2, 2, -2, 0]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257])
def test_zeros_stay_zeros(name, size):
    assert torch.equal(round_trip(name, torch.zeros(size), density=0.5), torch.zeros(size))


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-5, 1e-30, 1e30])
def test_integers_on_the_grid_are_kept_exactly(name, scale):
    step = torch.tensor(scale).bfloat16().float()  # few enough bits that levels times step is exact
    flat = torch.arange(-LEVELS[name], LEVELS[name] + 1).float() * step
    assert all(torch.equal(round_trip(name, flat, seed), flat) for seed in range(20))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_encoding_again_keeps_decoded_values_where_the_block_still_reaches_the_last_level(name):
    decoded, limit = round_trip(name, update(1000 * BLOCK)), LEVELS[name]
    scales = CODECS[name].encode(decoded, generator())["scales"].repeat_interleave(BLOCK)
    full = ((decoded / scales).abs().view(-1, BLOCK).amax(dim=1) == limit).repeat_interleave(BLOCK)
    assert full.float().mean() > 0.9
    assert all(torch.equal(round_trip(name, decoded, seed)[full], decoded[full]) for seed in range(10))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_last_level_covers_the_largest_value_of_a_block_with_little_slack(name):
    steps = (torch.rand(3000, generator=generator()) + 0.5).bfloat16().float()
    largest = torch.cat([steps * LEVELS[name], torch.nextafter(steps * LEVELS[name], torch.tensor(1e9)), steps])
    scales = CODECS[name].encode(functional.pad(largest.unsqueeze(1), (0, BLOCK - 1)).flatten(), generator())["scales"]
    assert (scales.double() * LEVELS[name] >= largest.double()).all()
    assert (scales.double() * LEVELS[name] <= largest.double() * (1 + 2.0**-15)).all()


def test_bfloat16_values_are_kept_exactly():
    flat = torch.cat([update(), torch.tensor([1e30, 1e-30, -0.0, 1e-40, 2.0**127])]).bfloat16().float()
    assert all(torch.equal(round_trip("bfloat16", flat, seed), flat) for seed in range(20))


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("value", [1e-30, -1e-30, 1e30, -(2.0**127), 1e-44])
def test_a_single_value_survives_at_any_magnitude(name, value):
    flat = torch.tensor([value])
    assert abs(round_trip(name, flat).item() - flat.item()) <= spacing(name, flat).item()


def test_an_outlier_coarsens_only_its_own_block():
    flat = update(3 * BLOCK)
    spoiled = flat.clone()
    spoiled[BLOCK] = 1e6
    error = (round_trip("int4", spoiled) - spoiled).abs().view(3, BLOCK).amax(dim=1)
    assert error[0] < 1e-3
    assert error[2] < 1e-3


@pytest.mark.parametrize("name", CODECS)
def test_the_same_random_stream_gives_the_same_arrays_and_leaves_the_update_unchanged(name):
    flat, before = update(), update()
    first, second = (CODECS[name].encode(flat, generator(5), 0.1) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(flat, before)


@pytest.mark.parametrize("name", UNBIASED)
def test_different_random_streams_round_differently(name):
    assert not torch.equal(round_trip(name, update(), seed=0), round_trip(name, update(), seed=1))


def test_int4_packs_the_first_of_two_values_in_the_lower_half():
    packed = CODECS["int4"].encode(torch.tensor([7.0, -7.0, 1.0]), generator())["codes"]
    assert packed.tolist() == [0x1F, 0x89]


@pytest.mark.parametrize(("name", "density"), [("top_k", 0.05), ("int4", 1.0), ("bfloat16", 1.0)])
def test_with_error_feedback_the_decoded_values_add_up_to_the_updates(name, density):
    random, residual = generator(), torch.zeros(1000)
    truth, received = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for round in range(200):
        each = update(seed=round) + 1e-3
        upload = compress(each, residual, CODECS[name], random, density)
        truth, received, residual = truth + each, received + upload.decoded, upload.residual
    torch.testing.assert_close(received + residual, truth, rtol=0, atol=1e-5)
    assert (received - truth).norm() < 0.2 * truth.norm()


def test_without_error_feedback_top_k_never_sends_the_small_entries():
    each = torch.tensor([1.0, 0.1])
    uploads = [compress(each, None, CODECS["top_k"], generator(), 0.5) for _ in range(20)]
    assert sum(upload.decoded for upload in uploads).tolist() == [20.0, 0.0]
    assert all(upload.residual is None for upload in uploads)


def test_compress_returns_what_the_server_decodes_and_the_residual():
    upload = compress(update(), update(seed=1), CODECS["int8"], generator())
    assert torch.equal(upload.decoded, CODECS["int8"].decode(upload.arrays, 1000))
    assert torch.equal(upload.residual, update() + update(seed=1) - upload.decoded)


def test_a_residual_of_another_size_is_refused():
    with pytest.raises(ValueError, match="residual like the update"):
        compress(update(), torch.zeros(1), CODECS["int8"], generator())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_values_that_are_not_finite_or_too_large_are_not_encoded(name, value):
    with pytest.raises(ValueError, match="Expected finite values"):
        CODECS[name].encode(torch.tensor([0.0, value]), generator())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("flat", [torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(0)])
def test_only_a_flat_float32_vector_is_encoded(name, flat):
    with pytest.raises(ValueError, match="Expected"):
        CODECS[name].encode(flat, generator())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        CODECS["top_k"].shapes(10, density)


def malformed(name):
    """Yields encodings of five values, each broken in one way."""
    arrays = CODECS[name].encode(torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]), generator(), 0.6)
    yield {}
    yield arrays | {"more": torch.zeros(1)}
    for key, array in arrays.items():
        yield {other: tensor for other, tensor in arrays.items() if other != key}
        yield arrays | {key: array[:-1]}
        yield arrays | {key: array.unsqueeze(0)}
        yield arrays | {key: array.to(torch.float64)}
    spoiled = {
        "bfloat16": {"bits": [0x7F80, 0x7FC0, 0xFF80]},
        "int8": {"codes": [0], "scales": [float("nan"), float("inf"), -1.0, 0.0, 3e38]},
        "int4": {"codes": [0x80, 0x08], "scales": [float("nan"), float("inf"), -1.0, 0.0, 3e38]},
        "top_k": {"indices": [-1, 5, 2**31 - 1, 4], "values": [float("nan"), float("inf")]},
    }
    for key, values in spoiled[name].items():
        for value in values:
            array = arrays[key].clone()
            array[0] = value
            yield arrays | {key: array}


@pytest.mark.parametrize("name", CODECS)
def test_malformed_arrays_are_refused(name):
    codec = CODECS[name]
    for arrays in malformed(name):
        with pytest.raises(ValueError, match=r"Expected .*, got"):
            codec.decode(arrays, 5, 0.6)


def test_repeated_indices_are_refused():
    arrays = {"indices": torch.tensor([1, 1], dtype=torch.int32), "values": torch.ones(2)}
    with pytest.raises(ValueError, match="ascending"):
        CODECS["top_k"].decode(arrays, 4, 0.5)


def test_a_client_cannot_send_more_entries_than_the_density_allows():
    arrays = CODECS["top_k"].encode(update(), generator(), 0.2)
    with pytest.raises(ValueError, match="top_k"):
        CODECS["top_k"].decode(arrays, 1000, 0.1)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_bytes_of_the_right_shapes_give_finite_values_or_an_error(name, data):
    codec, arrays = CODECS[name], {}
    for key, (dtype, shape) in codec.shapes(5, 0.6).items():
        raw = data.draw(st.binary(min_size=shape[0] * dtype.itemsize, max_size=shape[0] * dtype.itemsize))
        arrays[key] = torch.frombuffer(bytearray(raw), dtype=dtype)
    with suppress(ValueError):
        assert codec.decode(arrays, 5, 0.6).isfinite().all()

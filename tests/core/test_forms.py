"""Forms and flat arrays against dense masks: positions, smaller ranks, and products of the factors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.forms import DENSE, LORA, LORA_SB, RAVAN, AdapterSpec

FORMS = (LORA_SB, LORA, RAVAN, DENSE)


@st.composite
def specs(draw, forms=FORMS):
    form = draw(st.sampled_from(forms))
    heads = draw(st.integers(1, 3)) if form is RAVAN else 1
    layers = {f"layer.{i}": (draw(st.integers(4, 7)), draw(st.integers(4, 7))) for i in range(draw(st.integers(1, 3)))}
    return AdapterSpec(form, layers, draw(st.integers(1, 4)), heads, 0.5)


@st.composite
def specs_and_kinds(draw, forms=FORMS):
    spec = draw(specs(forms))
    return spec, draw(st.permutations(spec.kinds))[: draw(st.integers(1, len(spec.kinds)))]


def numbered(spec, kinds):
    """{name: tensor} in which every entry is its own position in the flat array of `kinds`."""
    layout = spec.layout(kinds)
    return layout.unpack(torch.arange(layout.num_parameters))


def random_factors(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layout = spec.layout(spec.kinds)
    return layout.unpack(torch.randn(layout.num_parameters, generator=generator, dtype=torch.float64))


def leading(spec, name, tensor, rank):
    """Returns the part of a LoRA or LoRA-SB factor that a client of this rank holds."""
    kind = name.rpartition(".")[2]
    return {"B": lambda: tensor[:, :rank], "R": lambda: tensor[:rank, :rank], "A": lambda: tensor[:rank]}[kind]()


@given(specs_and_kinds((LORA_SB, LORA)), st.integers(1, 6))
def test_a_block_is_the_leading_part_of_every_factor(spec_and_kinds, rank):
    spec, kinds = spec_and_kinds
    expected = [leading(spec, name, places, rank).flatten() for name, places in numbered(spec, kinds).items()]
    found = spec.block(kinds, rank)
    assert (found is None) == (rank >= spec.rank)
    if found is not None:
        assert found.tolist() == sorted(torch.cat(expected).tolist())
    assert spec.num_parameters(kinds, rank) == sum(map(len, expected))
    assert spec.num_parameters(kinds) == spec.layout(kinds).num_parameters


@given(specs((LORA_SB, LORA)), st.integers(1, 4))
def test_a_block_with_zeros_around_it_is_the_adapter_of_the_smaller_rank(spec, rank):
    factors, positions = random_factors(spec), spec.block(spec.kinds, rank)
    layout = spec.layout(spec.kinds)
    flat = torch.cat([factors[name].flatten() for name in layout.names])
    padded = layout.unpack(flat if positions is None else torch.zeros_like(flat).index_copy(0, positions, flat[positions]))
    small = replace(spec, rank=min(rank, spec.rank))
    cut = {name: leading(spec, name, tensor, rank) for name, tensor in factors.items()}
    for layer in spec.layers:
        assert {kind: tuple(tensor.shape) for kind, tensor in small.factors(cut, layer).items()} == small.shapes(layer)
        torch.testing.assert_close(spec.update(padded, layer), small.update(cut, layer))


@given(specs((RAVAN,)), st.data())
def test_head_positions_are_the_entries_of_these_heads(spec, data):
    kinds = data.draw(st.sampled_from([("H",), ("H", "s"), ("s",)]))
    heads = data.draw(st.sets(st.integers(0, spec.heads - 1), min_size=1))
    found = spec.head_positions(kinds, sorted(heads))
    expected = torch.cat([places[sorted(heads)].flatten() for places in numbered(spec, kinds).values()])
    assert (found is None) == (len(heads) == spec.heads)
    if found is not None:
        assert found.tolist() == sorted(expected.tolist())


@given(specs_and_kinds(), st.data())
def test_within_gives_the_positions_of_some_kinds(spec_and_kinds, data):
    spec, kinds = spec_and_kinds
    some = data.draw(st.sets(st.sampled_from(kinds)))
    places = [places.flatten() for name, places in numbered(spec, kinds).items() if name.rpartition(".")[2] in some]
    assert spec.within(kinds, tuple(some)).tolist() == (torch.cat(places).tolist() if places else [])


def ravan(own, rank):
    """Sums over heads, each with its own columns of B and rows of A."""
    parts = [slice(rank * k, rank * (k + 1)) for k in range(len(own["s"]))]
    return sum(own["s"][k] * own["B"][:, part] @ own["H"][k] @ own["A"][part] for k, part in enumerate(parts))


FORMULAS = {
    "lora_sb": lambda own, rank: own["B"] @ own["R"] @ own["A"],
    "lora": lambda own, rank: own["B"] @ own["A"],
    "ravan": ravan,
    "dense": lambda own, rank: own["D"],
}


@given(specs())
def test_the_update_follows_the_formula_of_its_form(spec):
    factors = random_factors(spec)
    for layer, shape in spec.layers.items():
        update = spec.update(factors, layer)
        assert tuple(update.shape) == shape
        torch.testing.assert_close(update, 0.5 * FORMULAS[spec.form.name](spec.factors(factors, layer), spec.rank))


@given(specs(), st.integers(1, 3))
def test_stacked_factors_give_stacked_chains(spec, groups):
    stacked = [random_factors(spec, seed) for seed in range(groups)]
    for layer in spec.layers:
        own = [spec.factors(factors, layer) for factors in stacked]
        together = spec.form.chain({kind: torch.stack([each[kind] for each in own]) for kind in spec.kinds})
        for place, matrix in enumerate(together):
            assert torch.equal(matrix, torch.stack([spec.form.chain(each)[place] for each in own]))


@given(specs_and_kinds())
def test_packing_keeps_the_models_order_for_any_order_of_the_adapter(spec_and_kinds):
    spec, kinds = spec_and_kinds
    factors = random_factors(spec)
    flat = spec.pack(dict(reversed(factors.items())), kinds)
    expected = torch.cat([factors[f"{layer}.{kind}"].flatten() for layer in spec.layers for kind in kinds])
    assert torch.equal(flat, expected.float())


@pytest.mark.parametrize("form", [form for form in FORMS if form.rank_axes])
def test_rank_axes_are_those_whose_length_is_the_rank(form):
    shapes = form.shapes(101, 103, 7, 1)
    assert form.rank_axes == {kind: tuple(axis for axis, size in enumerate(shape) if size == 7) for kind, shape in shapes.items()}

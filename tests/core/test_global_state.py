"""The global state alone: folds, the order in which they are sent, and digests."""

import pytest
import torch

from fedsim.core.exchange import Exchange
from fedsim.core.forms import LORA_SB, AdapterSpec
from fedsim.core.global_state import GlobalState, folded_layout
from fedsim.core.initialization import from_seed

SPEC = AdapterSpec(LORA_SB, {"z": (6, 5), "a": (4, 7)}, rank=2, scaling=0.5)  # not in the order of names


def state(seed=0):
    factors = from_seed(SPEC, {}, seed)
    generator = torch.Generator().manual_seed(seed)
    factors |= {name: torch.randn(2, 2, generator=generator) for name in factors if name.endswith(".R")}
    return GlobalState(SPEC, factors, Exchange(dict.fromkeys((*"BRA", "W"), 0), frozenset("W")))


def matrices(seed, *kinds):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W": lambda m, n: (m, n), "U": lambda m, n: (m, 3), "V": lambda m, n: (3, n)}
    return {f"{layer}.{k}": torch.randn(shapes[k](m, n), generator=generator) for layer, (m, n) in SPEC.layers.items() for k in kinds}


def test_folds_of_every_form_add_up():
    shared = state()
    dense, factored, R = matrices(1, "W"), matrices(2, "U", "V"), SPEC.pick(shared.factors, ("R",))
    shared.fold(dense, 1)
    assert shared.increment == {}, "a dense matrix travels as the whole sum"
    shared.fold(factored, 2)
    assert shared.increment is factored
    shared.fold(R, 3, builds_on=("B", "A"))
    assert shared.exchange.needed == {"W": 2, "B": 0, "A": 0}
    for layer in SPEC.layers:
        B, A = (shared.factors[f"{layer}.{kind}"] for kind in "BA")
        expected = dense[f"{layer}.W"] + factored[f"{layer}.U"] @ factored[f"{layer}.V"] + 0.5 * B @ R[f"{layer}.R"] @ A
        torch.testing.assert_close(shared.folded[layer], expected, rtol=0, atol=1e-5)


def test_the_whole_fold_is_sent_in_model_order_even_if_a_checkpoint_restored_another_order():
    shared = state()
    shared.fold(matrices(1, "W"), 1)
    shared.folded = {layer: shared.folded[layer] for layer in sorted(shared.folded)}
    for layer, dense in folded_layout(SPEC).unpack(shared.whole()).items():
        assert torch.equal(dense, shared.folded[layer])


def test_the_flat_factors_are_cached_until_they_are_replaced():
    shared = state()
    before = shared.flat(("R",))
    assert shared.flat(("R",)) is before
    assert torch.equal(before, SPEC.pack(shared.factors, ("R",)))
    shared.replace(state(1).factors, ("R",), 1)
    assert torch.equal(shared.flat(("R",)), SPEC.pack(state(1).factors, ("R",)))
    assert not torch.equal(shared.flat(("R",)), before)


def test_the_tag_identifies_what_was_folded_and_in_which_order():
    def tag(*seeds):
        shared = state()
        for round_, seed in enumerate(seeds, 1):
            shared.fold(matrices(seed, "W"), round_)
        return shared.tag

    assert tag() == ""
    assert tag(1, 2) == tag(1, 2)
    assert len({tag(1), tag(2), tag(1, 2), tag(2, 1)}) == 4


@pytest.mark.parametrize("kind", "BRA")
def test_a_part_that_changes_gets_a_new_digest_even_within_one_round(kind):
    shared = state()
    shared.replace(from_seed(SPEC, {}, 1), "BRA", 1)
    first, of_all = shared.digests(), shared.adapter_digest()
    changed = {name: tensor + 1 if name.endswith(kind) else tensor for name, tensor in shared.factors.items()}
    shared.replace(changed, kind, 1)
    assert {part for part, digest in shared.digests().items() if digest != first[part]} == {kind}
    assert shared.adapter_digest() != of_all

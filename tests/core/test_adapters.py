import pytest
import torch
from conftest import ARCHITECTURES, adapted_model, tiny_model

from fedsim.core.adapters import (
    DEFAULT_RANK,
    AdaptedLinear,
    adapt,
    adapted_layers,
    bound,
    factors,
    matrix_shape,
    merged,
    unadapted,
    weight_matrix,
)
from fedsim.core.forms import LORA_SB, RAVAN
from fedsim.errors import UserError


def logits(model, rows=3):
    ids = torch.arange(4, 4 + 6 * rows).remainder(50).view(rows, 6)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_equals_a_dense_model_with_the_update_added_to_its_weights(architecture):
    model, dense = adapted_model(architecture), tiny_model(architecture)
    for name, layer in adapted_layers(model).items():
        update = layer.scaling * layer.B @ layer.R @ layer.A
        weight = dense.get_submodule(name).weight
        weight.data += update.T if weight.shape != update.shape or architecture == "gpt2" else update
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_give_the_same_output_and_leave_the_base_weights_bit_for_bit(architecture):
    model = adapted_model(architecture)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    with merged(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_all_linear_layers_of_the_blocks_are_adapted_and_the_head_is_not():
    names = {name.rsplit(".", 1)[-1] for name in adapted_layers(adapted_model("llama"))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapted_layers(adapted_model("gpt2"))) == 8


def test_only_the_named_layers_are_adapted():
    model = tiny_model("llama")
    adapt(model, LORA_SB, 4, 1, 1.0, ["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[-1] for name in adapted_layers(model)} == {"q_proj", "v_proj"}


def test_an_unknown_layer_name_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"no linear layer is named 'q_pro'.*Did you mean 'q_proj'"):
        adapt(tiny_model("llama"), LORA_SB, 4, 1, 1.0, ["q_pro"])


def test_a_rank_above_the_layer_size_is_refused_and_the_model_is_unchanged():
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"adapter.rank: expected at most 16.*got 17"):
        adapt(model, LORA_SB, 17, 1, 1.0, [])
    assert not adapted_layers(model)


def test_the_rank_defaults_to_the_default_rank_or_a_smaller_layer_side():
    small, named = tiny_model("llama"), tiny_model("llama")
    adapt(small, LORA_SB, None, 1, 1.0, [])
    adapt(named, LORA_SB, None, 1, 1.0, ["o_proj"])
    assert {layer.R.shape[0] for layer in adapted_layers(small).values()} == {16}
    assert {layer.R.shape[0] for layer in adapted_layers(named).values()} == {min(DEFAULT_RANK, 32)}


def test_bound_restores_the_old_factors_even_after_an_error():
    model = adapted_model()
    before = factors(model, ("R",))
    with pytest.raises(ZeroDivisionError), bound(model, {name: torch.zeros(2, 8, 8) for name in before}):
        raise ZeroDivisionError
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(model, ("R",)).items())


def test_no_parameter_of_an_adapted_model_requires_gradients():
    assert not any(p.requires_grad for p in adapted_model().parameters())


def test_conv1d_weights_are_read_as_out_by_in():
    layer = tiny_model("gpt2").get_submodule("transformer.h.0.mlp.c_fc")
    assert weight_matrix(layer).shape == (128, 32)
    assert AdaptedLinear(layer, LORA_SB, 4, 1, 1.0).update().shape == (128, 32)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_unadapted_model_gives_the_output_of_the_base_model(architecture):
    model = adapted_model(architecture)
    with unadapted(model):
        torch.testing.assert_close(logits(model), logits(tiny_model(architecture)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny_model(architecture)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fold_replaces_the_previous_fold_and_adds_to_the_loaded_weight(architecture):
    model, dense = adapted_model(architecture), tiny_model(architecture)
    for name, layer in adapted_layers(model).items():
        update = torch.randn(layer.update().shape, generator=torch.Generator().manual_seed(0)) * 0.1
        layer.fold(torch.ones_like(update))
        layer.fold(update)
        dense.get_submodule(name).weight.data += update.T if architecture == "gpt2" else update
    with unadapted(model):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_shared_weight_is_refused_as_a_target():
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match=r"'lm_head' shares its weight \(.*embed_tokens.*lm_head"):
        adapt(model, LORA_SB, 4, 1, 1.0, ["lm_head"])


def test_too_many_heads_are_refused_with_an_error_about_method_heads():
    with pytest.raises(UserError, match=r"method\.heads: expected at most \d+"):
        adapt(tiny_model("llama"), RAVAN, None, 10**4, 1.0, [])


def coarse_model(size):
    """A bfloat16 model whose updates, of this size, are far below the last digit of most weights, and low-rank updates of its layers."""
    model = adapted_model().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    updates = {}
    for name, layer in adapted_layers(model).items():
        for kind in layer.shapes:  # factors are float32, whatever the base
            layer._buffers[kind] = layer._buffers[kind].float()
        layer.R.mul_(size)
        rows, columns = matrix_shape(layer.base)
        updates[name] = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator) * size * 1e-2
    return model, updates


def inputs_and_output_change(layer, change):
    """Returns bfloat16 inputs, and what a change of W [out, in] adds to a layer's output for them, in float64."""
    x = torch.randn(5, change.shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    return x, x.double() @ change.double().T


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_small_updates_of_a_bfloat16_base_are_not_lost_when_folded_or_evaluated(size):
    """A sum in bfloat16 drops an entry below half of the last digit of W."""
    model, updates = coarse_model(size)
    for name, layer in adapted_layers(model).items():
        base = weight_matrix(layer.base).clone()
        plain = layer.update()
        layer.fold(updates[name])
        assert torch.equal(weight_matrix(layer.base), base)
        torch.testing.assert_close(layer.weight(), base.float() + updates[name], rtol=0, atol=1e-7)
        x, expected = inputs_and_output_change(layer, plain + updates[name])
        weight_matrix(layer.base).zero_()  # so that the output is as precise as the update
        with merged(model):
            found = layer(x)
        assert float((found.double() - expected).norm()) < 0.01 * float(expected.norm())
        with unadapted(model):
            found = layer(x)
        folded = x.double() @ updates[name].double().T
        assert float((found.double() - folded).norm()) < 0.01 * float(folded.norm()), "what is folded belongs to the base weights"
        layer.fold(None)
        x, expected = inputs_and_output_change(layer, plain)
        assert float((layer(x).double() - expected).norm()) < 0.01 * float(expected.norm())


def test_a_folded_update_of_a_bfloat16_base_contributes_to_the_input_gradient():
    model, updates = coarse_model(1.0)
    name, layer = next(iter(adapted_layers(model).items()))
    layer.fold(updates[name])
    x = inputs_and_output_change(layer, updates[name])[0].requires_grad_()
    layer(x).sum().backward()
    whole = (layer.weight() + layer.update()).double()
    assert float((x.grad.double() - whole.sum(0)).norm()) < 0.02 * float(whole.sum(0).norm()) * len(x) ** 0.5

import pytest
import torch
from conftest import ARCHITECTURES, adapted_model, tiny_model

from fedsim.core.adapters import adapt, adapted_layers, factors, matrix_shape
from fedsim.core.forms import LORA_SB
from fedsim.core.gradient_parts import GradientParts, Sketch
from fedsim.core.payload import Layout
from fedsim.training.batches import collate
from fedsim.training.gradients import FactoredGradients, example_gradients, factor_gradients, weight_gradients
from fedsim.training.loss import group_gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_gradients_equal_autograd_one_example_at_a_time(architecture, sequences):
    model, plain, examples = adapted_model(architecture), tiny_model(architecture), sequences(4)
    for layer in adapted_layers(model).values():
        layer.R = torch.zeros_like(layer.R)
    found = weight_gradients(model, examples, pad_id=0, tokens_per_pass=30)
    for name in found:
        plain.get_submodule(name).weight.requires_grad_(True)
    for example in examples:
        labels = torch.tensor([[-100] * example.loss_start + example.input_ids[example.loss_start :].tolist()])
        plain(input_ids=torch.tensor([example.input_ids.tolist()]), labels=labels, use_cache=False).loss.backward()
    for name, gradient in found.items():
        expected = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(gradient, expected.T if architecture == "gpt2" else expected, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_of_a_bfloat16_model_are_summed_in_float32(sequences):
    exact, coarse, examples = adapted_model(), adapted_model().to(torch.bfloat16), sequences(4)
    expected = weight_gradients(exact, examples, pad_id=0, tokens_per_pass=30)
    for name, gradient in weight_gradients(coarse, examples, pad_id=0, tokens_per_pass=30).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm()) < 0.05 * float(expected[name].norm())


def test_no_examples_give_zero_gradients():
    assert not any(g.any() for g in weight_gradients(adapted_model(), [], pad_id=0, tokens_per_pass=30).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_with_activation_checkpointing(architecture, sequences):
    examples, found = sequences(4), []
    for checkpointing in (False, True):
        model = tiny_model(architecture, activation_checkpointing=checkpointing)
        adapt(model, LORA_SB, 4, 1, 1.0, [])
        found.append(weight_gradients(model, examples, pad_id=0, tokens_per_pass=30))
    assert any(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sketches_equal_those_of_the_whole_gradients(architecture, sequences):
    model, examples = adapted_model(architecture), sequences(4)
    shapes = {name: matrix_shape(layer.base) for name, layer in adapted_layers(model).items()}
    parts = GradientParts(shapes, {name: Sketch.of(shape, 4, 0) for name, shape in shapes.items()})
    whole = weight_gradients(model, examples, pad_id=0, tokens_per_pass=30)
    found = weight_gradients(model, examples, pad_id=0, tokens_per_pass=30, parts=parts)
    assert tuple(found) == parts.layout.names
    for name, gradient in whole.items():
        omega, psi = parts.sketches[name].mixing(torch.device("cpu"))
        torch.testing.assert_close(found[f"{name}.columns"], gradient @ omega, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[f"{name}.rows"], psi @ gradient, rtol=1e-3, atol=1e-6)
    each = example_gradients(model, examples, pad_id=0, parts=parts)
    for part, value in found.items():
        torch.testing.assert_close(each[part].along(value).sum(), value.square().sum(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_products_of_example_gradients_equal_those_of_whole_gradients(architecture, sequences):
    model, examples = adapted_model(architecture), sequences(4)
    whole = [weight_gradients(model, [example], pad_id=0, tokens_per_pass=100) for example in examples]
    generator = torch.Generator().manual_seed(0)
    for name, found in example_gradients(model, examples, pad_id=0).items():
        expected = torch.stack([gradients[name] for gradients in whole])
        direction = torch.randn(expected.shape[1:], generator=generator)
        left, right = torch.randn(expected.shape[1], 3, generator=generator), torch.randn(3, expected.shape[2], generator=generator)
        gram = expected.flatten(1) @ expected.flatten(1).T
        torch.testing.assert_close(found.gram(), gram, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.squared_norms(), gram.diagonal(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.along(direction), (expected * direction).sum((1, 2)), rtol=1e-3, atol=1e-4)
        inside = found.within(left, right)
        torch.testing.assert_close(inside.squared_norms(), (left.T @ expected @ right.T).square().sum((1, 2)), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_used_twice_has_the_gradients_of_both_uses(sequences):
    generator = torch.Generator().manual_seed(0)
    deltas, inputs = torch.randn(3, 10, 5, generator=generator), torch.randn(3, 10, 4, generator=generator)
    whole = torch.einsum("eto,eti->eoi", deltas, inputs)
    found = FactoredGradients(deltas[:, :6], inputs[:, :6]).beside(deltas[:, 6:], inputs[:, 6:])
    torch.testing.assert_close(found.gram(), whole.flatten(1) @ whole.flatten(1).T)
    model, examples = adapted_model(), sequences(3)
    first, second = (block.self_attn for block in model.model.layers[:2])
    second.q_proj = first.q_proj
    name = "model.layers.0.self_attn.q_proj"
    whole = [weight_gradients(model, [example], pad_id=0, tokens_per_pass=100)[name] for example in examples]
    found = example_gradients(model, examples, pad_id=0)[name].squared_norms()
    torch.testing.assert_close(found, torch.stack([gradient.square().sum() for gradient in whole]), rtol=1e-3, atol=1e-6)


def test_factor_gradients_equal_those_of_each_example_alone(sequences):
    model, examples = adapted_model(), sequences(3)
    held = factors(model, ("R",))
    layout = Layout.of(held)
    found = factor_gradients(model, layout.pack(held), layout, examples, pad_id=0)
    for row, example in zip(found, examples, strict=True):
        _, alone = group_gradients(model, held, collate([example], 0, torch.device("cpu")), torch.ones(1))
        torch.testing.assert_close(row, layout.pack(alone), rtol=1e-4, atol=1e-6)

import pytest
import torch
from conftest import ARCHITECTURES, adapted_model, tiny_model

from fedsim.core.adapters import adapted_layers
from fedsim.training.gradients import weight_gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_gradients_equal_autograd_one_example_at_a_time(architecture, sequences):
    model, plain, examples = adapted_model(architecture), tiny_model(architecture), sequences(4)
    for layer in adapted_layers(model).values():
        layer.R = torch.zeros_like(layer.R)
    found = weight_gradients(model, examples, pad_id=0, tokens_per_pass=30)
    for name in found:
        plain.get_submodule(name).weight.requires_grad_(True)
    for example in examples:
        labels = torch.tensor([[-100] * example.loss_start + list(example.input_ids[example.loss_start :])])
        plain(input_ids=torch.tensor([example.input_ids]), labels=labels, use_cache=False).loss.backward()
    for name, gradient in found.items():
        expected = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(gradient, expected.T if architecture == "gpt2" else expected, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())


def test_no_examples_give_zero_gradients():
    assert not any(g.any() for g in weight_gradients(adapted_model(), [], pad_id=0, tokens_per_pass=30).values())

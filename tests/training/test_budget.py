"""The budget of a pass: how it follows from memory and is halved; what a pass keeps is tested in tests/core/test_pass_memory.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, CLASSIFIERS, adapted_model, tiny_classifier, tiny_model

from fedsim.cli.compose import compose
from fedsim.config import EvaluationConfig, TrainingConfig
from fedsim.core.adapters import adapter_spec, factors
from fedsim.core.memory import shape_of
from fedsim.core.payload import Layout
from fedsim.effective import effective, method_of
from fedsim.seeding import NoiseKey
from fedsim.shapes import layer_shapes
from fedsim.training.budget import (
    GENERATED_ON_GPU,
    GPU_SHARE,
    GPU_SHARE_OF_ANSWERS,
    ROW_TOKENS,
    SMALLEST,
    Load,
    TokenBudget,
    tokens_for_answers_on_gpu,
    tokens_for_training,
    tokens_on_gpu,
)
from fedsim.training.cohort import ClientData, train_cohort
from fedsim.training.private import PrivateRule

KEY = NoiseKey.of_seed(0)


def train(model, cohort, budget=None, noise=(), **options):
    current = factors(model, ("R",))
    layout, training = Layout.of(current), TrainingConfig(**{"batch_size": 3, "local_steps": 2, "learning_rate": 1e-2, **options})
    private = PrivateRule(0.05, noise, KEY) if noise else None
    start = layout.pack(current)
    return train_cohort(model, start, layout, cohort, training, pad_id=0, seed=0, round=1, rounds=1, private=private, budget=budget)


def with_memory_for(model, tokens):
    """Makes the model run out of memory in any pass of more than `tokens` tokens."""

    def check(module, arguments, options):
        if options["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("no memory left")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize("noise", [(), (1.0, 1.0, 0.5)])
def test_out_of_memory_halves_the_budget_and_does_not_change_the_result(noise, sequences):
    cohort = [ClientData(i, sequences(n, seed=i)) for i, n in enumerate((5, 3, 9))]
    budget = TokenBudget(400)
    found = train(with_memory_for(adapted_model(), 85), cohort, budget, noise)  # rows are padded a little beyond the budget
    assert budget.tokens in (50, 100), "halved as often as the batches ask that were drawn"
    for result, expected in zip(found, train(adapted_model(), cohort, TokenBudget(400), noise), strict=True):
        torch.testing.assert_close(result.factors, expected.factors, rtol=1e-5, atol=1e-6)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5, nan_ok=True)


def test_a_device_without_memory_for_the_smallest_pass_raises_out_of_memory(sequences):
    budget = TokenBudget(400)
    with pytest.raises(torch.OutOfMemoryError):
        train(with_memory_for(adapted_model(), 2), [ClientData(0, sequences(4))], budget)
    assert budget.tokens < 2 * SMALLEST


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma", "gpt2"])
def test_cache_bytes_are_keys_and_values_of_every_block_and_answers_are_assumed_to_need_more(architecture):
    model = tiny_model(architecture).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 13).unsqueeze(0), use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values)) / 10
    shape = shape_of(model)
    assert held == shape.cache_bytes < shape.answer_bytes < 12 * held
    assert shape_of(model, 2).answer_bytes == shape.answer_bytes / 2


def test_a_generation_batch_follows_from_the_memory_of_a_gpu_and_is_fixed_on_a_cpu():
    model, (few, many) = tiny_model("llama"), GENERATED_ON_GPU
    shape = shape_of(model)
    assert TokenBudget.of_evaluation(EvaluationConfig(), model).tokens == few
    assert TokenBudget.of_evaluation(EvaluationConfig(tokens_per_pass=500), model).tokens == 500
    assert tokens_for_answers_on_gpu(shape, 0) == few
    assert tokens_for_answers_on_gpu(shape, int(1.1 * 4 * few * shape.answer_bytes / GPU_SHARE_OF_ANSWERS)) == 4 * few
    assert tokens_for_answers_on_gpu(shape, 10**15) == many


def test_a_given_budget_is_used_and_an_automatic_one_is_a_power_of_two():
    model = tiny_model("llama")
    assert TokenBudget.of(TrainingConfig(tokens_per_pass=77), model).tokens == 77
    assert TokenBudget.of(TrainingConfig(), model).tokens == tokens_for_training(model) >= 1024
    assert tokens_for_training(model).bit_count() == 1


@pytest.mark.parametrize(
    "model", [*(partial(tiny_model, name) for name in ARCHITECTURES), *(partial(tiny_classifier, name) for name in CLASSIFIERS)]
)
def test_the_tokens_of_a_pass_on_a_gpu_follow_from_its_memory_for_every_kind_of_model(model):
    shape, load = shape_of(model()), Load(longest=64)
    free = load.pass_bytes(shape, 8192, checkpointing=False) / GPU_SHARE
    assert tokens_on_gpu(shape, load, int(1.01 * free), checkpointing=False) == 8192
    assert tokens_on_gpu(shape, load, int(0.99 * free), checkpointing=False) == 4096
    assert load.pass_bytes(shape, 8192, checkpointing=True) < load.pass_bytes(shape, 8192, checkpointing=False)


def load_of(*overrides):
    config = compose(["adapter.rank=8", *overrides])
    config, method = effective(config), method_of(config)
    spec = adapter_spec(layer_shapes(config.model, []), method.form, 8, config.method.heads, 1.0)
    return Load.of(config, spec, method), spec


def test_the_load_covers_the_clients_that_train_at_once():
    usual = ("federation.clients=20", "training.batch_size=4", "training.accumulation=2")
    load, spec = load_of(*usual)
    assert (load.groups, load.rows, load.trained) == (20 * 2, 4, ("R",))
    assert load.held_bytes == 20 * 4 * 4 * spec.num_parameters(("R",)), "factors, gradient and two moments"
    assert load_of(*usual, "federation.fraction=0.5")[0].groups == 20
    assert load_of(*usual, "engine.cohort_size=5")[0].groups == 10
    private, _ = load_of(*usual, "privacy=example", "privacy.epsilon=8")
    assert (private.groups, private.rows) == (20 * 2 * 4, 1), "each row has factors and gradients of its own"
    assert load_of(*usual, "method=rolora")[0].trained == ("A", "B"), "of all rounds"


def test_more_groups_and_weight_gradients_need_more_memory_for_the_same_tokens():
    shape, (load, _) = shape_of(tiny_model("llama")), load_of("federation.clients=20")
    of_weights = load.of_weight_gradients(1000)

    def needed(load, tokens=4096):
        return load.pass_bytes(shape, tokens, checkpointing=False) - load.held_bytes

    assert needed(load) > needed(replace(load, groups=1))
    assert needed(replace(load, groups=10**6, rows=1)) == needed(replace(load, groups=4096 // ROW_TOKENS, rows=1)), "rows are not shorter"
    assert of_weights.held_bytes == 4000
    assert needed(of_weights) > needed(replace(of_weights, spec=Load().spec))

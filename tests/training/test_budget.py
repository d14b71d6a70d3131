"""The budget of a pass: what memory it assumes against what autograd keeps, and how it gives way."""

from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, CLASSIFIERS, adapted_model, tiny_classifier, tiny_model

from fedsim.config import EvaluationConfig, TrainingConfig
from fedsim.core import head_loss
from fedsim.core.adapters import adapt, factors
from fedsim.core.forms import LORA_SB
from fedsim.core.payload import Layout
from fedsim.seeding import NoiseKey
from fedsim.training.batches import collate
from fedsim.training.budget import (
    GENERATED_ON_GPU,
    GPU_SHARE,
    GPU_SHARE_OF_ANSWERS,
    SMALLEST,
    TokenBudget,
    bytes_per_answer_token,
    chosen,
    chosen_for,
    chosen_for_answers_within,
    pass_bytes,
)
from fedsim.training.cohort import ClientData, train_cohort
from fedsim.training.loss import group_gradients
from fedsim.training.private import PrivateRule

KEY = NoiseKey.of_seed(0)


def train(model, cohort, budget=None, noise=(), **options):
    current = factors(model, ("R",))
    layout, training = Layout.of(current), TrainingConfig(**{"batch_size": 3, "local_steps": 2, "learning_rate": 1e-2, **options})
    private = PrivateRule(0.05, noise, KEY) if noise else None
    start = layout.pack(current)
    return train_cohort(model, start, layout, cohort, training, pad_id=0, seed=0, round=1, rounds=1, private=private, budget=budget)


def with_memory_for(model, tokens):
    """The model on a device that runs out of memory in the middle of a pass of more than `tokens` tokens."""

    def check(module, arguments, options):
        if options["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("no memory left")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


@pytest.mark.parametrize("noise", [(), (1.0, 1.0, 0.5)])
def test_where_memory_runs_out_the_budget_is_halved_and_the_result_is_the_same(noise, sequences):
    cohort = [ClientData(i, sequences(n, seed=i)) for i, n in enumerate((5, 3, 9))]
    budget = TokenBudget(400)
    found = train(with_memory_for(adapted_model(), 85), cohort, budget, noise)  # rows are padded a little beyond the budget
    assert budget.tokens in (50, 100), "halved as often as the batches ask that were drawn"
    for result, expected in zip(found, train(adapted_model(), cohort, TokenBudget(400), noise), strict=True):
        torch.testing.assert_close(result.factors, expected.factors, rtol=1e-5, atol=1e-6)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5, nan_ok=True)


def test_a_device_without_memory_for_the_smallest_pass_is_told(sequences):
    budget = TokenBudget(400)
    with pytest.raises(torch.OutOfMemoryError):
        train(with_memory_for(adapted_model(), 2), [ClientData(0, sequences(4))], budget)
    assert budget.tokens < 2 * SMALLEST


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma", "gpt2"])
def test_the_memory_that_is_assumed_for_answers_holds_keys_and_values_of_every_block(architecture):
    model = tiny_model(architecture).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 13).unsqueeze(0), use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values)) / 10
    assert held < bytes_per_answer_token(model) < 12 * held
    assert bytes_per_answer_token(model, element=2) == bytes_per_answer_token(model) / 2


def test_a_generation_batch_follows_from_the_memory_of_a_gpu_and_is_fixed_on_a_cpu():
    model = tiny_model("llama")
    each, few, many = bytes_per_answer_token(model), *GENERATED_ON_GPU
    assert TokenBudget.of_evaluation(EvaluationConfig(), model).tokens == few
    assert TokenBudget.of_evaluation(EvaluationConfig(tokens_per_pass=500), model).tokens == 500
    assert chosen_for_answers_within(model, 0) == few
    assert chosen_for_answers_within(model, int(1.1 * 4 * few * each / GPU_SHARE_OF_ANSWERS)) == 4 * few
    assert chosen_for_answers_within(model, 10**15) == many


def test_a_number_is_taken_and_auto_is_chosen():
    model = tiny_model("llama")
    assert TokenBudget.of(TrainingConfig(tokens_per_pass=77), model).tokens == 77
    assert TokenBudget.of(TrainingConfig(), model).tokens == chosen(model) >= 1024
    assert chosen(model).bit_count() == 1


@pytest.mark.parametrize(
    "model", [*(partial(tiny_model, name) for name in ARCHITECTURES), *(partial(tiny_classifier, name) for name in CLASSIFIERS)]
)
def test_the_tokens_of_a_pass_on_a_gpu_follow_from_its_memory_for_every_kind_of_model(model):
    plain, sparing = model(), model(activation_checkpointing=True)
    free = pass_bytes(plain, 10_000) / GPU_SHARE
    assert chosen_for(plain, int(1.01 * free)) == 8192
    assert chosen_for(plain, int(2.02 * free)) == 16384
    assert pass_bytes(sparing, 8192) < pass_bytes(plain, 8192)


def test_logits_are_reckoned_in_parts_only_where_the_loss_takes_them_so(monkeypatch):
    monkeypatch.setattr(head_loss, "LOGIT_BYTES", 1000)
    last, scaled, adapted = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    scaled.config.logit_scale = 2.0
    adapted.lm_head.weight = torch.nn.Parameter(adapted.lm_head.weight.clone())  # no longer the embedding's
    adapt(adapted, LORA_SB, 2, 1, 1.0, ["lm_head", "q_proj"])

    logits = 16 * 1000 * last.config.vocab_size
    assert pass_bytes(scaled, 1000) - pass_bytes(last, 1000) == logits - 4 * 1000
    assert pass_bytes(adapted, 1000) == pass_bytes(scaled, 1000)


def assumed_and_kept(model, batch):
    """Bytes per token as assumed, and those of all tensors that the forward pass leaves to the backward pass."""
    kept, fixed = {}, {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so that its address is not given away again
        return tensor

    stack = {name: tensor.unsqueeze(0) for name, tensor in factors(model, ("R",)).items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        group_gradients(model, stack, batch, torch.ones(len(batch.input_ids)))
    tokens = batch.input_ids.numel()
    return pass_bytes(model, tokens) / tokens, sum(size for size, _ in kept.values()) / tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_memory_that_is_assumed_holds_what_autograd_keeps_and_not_much_more(architecture, sequences):
    batch = collate(sequences(16), 0, torch.device("cpu"))
    assumed, kept = assumed_and_kept(adapted_model(architecture), batch)
    assert 0.8 * kept < assumed < 3 * kept
    with_checkpoints, kept = assumed_and_kept(adapted_model(architecture, activation_checkpointing=True), batch)
    assert kept < with_checkpoints < assumed  # what is computed again for one block is not seen from outside

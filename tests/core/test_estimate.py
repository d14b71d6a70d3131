"""FLOPs against torch's own counter, parameters against the model's, bytes against the forecast of the cost."""

from dataclasses import replace

import pytest
import torch
from conftest import LABELS, VOCABULARY, tiny_classifier, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from fedsim.cli.compose import compose
from fedsim.config import ModelConfig
from fedsim.core import gemm
from fedsim.core.adapters import adapt, factors
from fedsim.core.cost import forecast
from fedsim.core.estimate import (
    GRADIENT_COPIES,
    Calibration,
    Work,
    chain_parameters,
    estimate,
    forward_flops,
    trained_parameters,
    training_flops,
)
from fedsim.core.forms import HEAD, LORA, LORA_SB
from fedsim.core.memory import shape_of
from fedsim.effective import effective, method_of
from fedsim.models import head_paths
from fedsim.shapes import adapter_of, layer_shapes, model_shape, num_parameters
from fedsim.training.batches import collate
from fedsim.training.loss import batch_loss, group_gradients
from fedsim.types import EncodedExample, EncodedLabelled

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
SHAPE = model_shape(ModelConfig(architecture=TINY))
RANK, ROWS, LENGTH, START = 8, 4, 16, 5  # rows of this length are not padded
TOKENS = ROWS * LENGTH
WORK = Work(tokens=60, responses=25, train_examples=10_000, questions=100, prompt=35, answer=25)
RATES = Calibration(1e10, 1e-2, 1e-3, 1e9, 5e-3, 1e9, 1e-3, 1e9, 400_000_000, "made up")


def counted(form, kinds):
    """FLOPs of forward and of both passes by torch's counter, the specification, FLOPs that the first layers skip, and the targets."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # the fused kernel of the CPU is not counted
    spec = adapt(model, form, RANK, 1, 1.0, [])
    batch = collate([EncodedExample(tuple(range(3, 3 + LENGTH)), START) for _ in range(ROWS)], 0, torch.device("cpu"))
    with torch.no_grad():
        batch_loss(model, batch)  # finds out whether the head comes last
        with FlopCounterMode(display=False) as forward:
            batch_loss(model, batch)
    stacked = {name: factor.unsqueeze(0) for name, factor in factors(model, kinds).items()}
    with FlopCounterMode(display=False) as both:
        group_gradients(model, stacked, batch, torch.ones(ROWS))
    first = [spec.layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    inner = RANK * RANK if form is LORA_SB else 0  # the gradient of A x, which no trained factor of the first layers needs
    unneeded = 2 * TOKENS * sum(out * into + RANK * into + inner for out, into in first)
    return forward.get_total_flops(), both.get_total_flops(), spec, unneeded, ROWS * batch.labels.shape[1]


@pytest.mark.parametrize(("form", "kinds"), [(LORA_SB, ("R",)), (LORA, ("B", "A"))])
def test_flops_equal_torchs_counts(form, kinds, monkeypatch):
    monkeypatch.setattr(gemm, "has_onednn", lambda: False)  # its products are not counted
    forward, both, spec, unneeded, targets = counted(form, kinds)
    adapters, trained = chain_parameters(spec), spec.num_parameters(kinds)
    assert forward_flops(SHAPE, TOKENS, LENGTH, targets, adapters) == forward
    assert training_flops(SHAPE, TOKENS, LENGTH, targets, adapters, trained) - unneeded == both


def pairs(model, *, apart):
    """Rows to classify, without padding, as one sequence or as two of half the length."""
    return collate([EncodedLabelled(tuple(range(3, 3 + LENGTH)), (), 0, LENGTH // 2 * apart)] * ROWS, 0, torch.device("cpu"))


@pytest.mark.parametrize("apart", [False, True])
def test_flops_of_a_classifier_equal_torchs_counts_without_pooler_and_head(apart, monkeypatch):
    monkeypatch.setattr(gemm, "has_onednn", lambda: False)
    model = tiny_classifier("apart" if apart else "bert")
    model.bert.set_attn_implementation("eager")
    spec, kinds = adapt(model, LORA, RANK, 1, 1.0, [], head_paths(model)), ("B", "A", HEAD)
    batch, sequences = pairs(model, apart=apart), 1 + apart
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        batch_loss(model, batch)
    stacked = {name: factor.unsqueeze(0) for name, factor in factors(model, kinds).items()}
    with FlopCounterMode(display=False) as both:
        group_gradients(model, stacked, batch, torch.ones(ROWS))
    adapters, trained = chain_parameters(spec), trained_parameters(spec, kinds)
    width = 32 * (3 if apart else 1)
    pooler, head = 2 * ROWS * sequences * 32 * 32, 2 * ROWS * len(LABELS) * (width + 1)
    assert forward_flops(shape_of(model), TOKENS, LENGTH / sequences, 0, adapters) == forward.get_total_flops() - pooler - head
    unneeded = 2 * TOKENS * 3 * (32 * 32 + RANK * 32)  # gradients of the input of the first three layers
    through_pooler = pooler * (1 if apart else 2)  # where texts are read apart its result is unused
    rest = both.get_total_flops() - through_pooler - 3 * head
    assert training_flops(shape_of(model), TOKENS, LENGTH / sequences, 0, adapters, trained) - unneeded == rest


def test_checkpointing_costs_one_more_forward_without_logits():
    more = training_flops(SHAPE, TOKENS, LENGTH, 20, 0, 0, checkpointing=True) - training_flops(SHAPE, TOKENS, LENGTH, 20, 0, 0)
    assert more == forward_flops(SHAPE, TOKENS, LENGTH, 0)


@pytest.mark.parametrize("name", ["mistral_7b", "llama32_1b", "llama31_70b", "gpt2"])
def test_the_parameters_in_a_models_shape_are_those_of_its_skeleton(name):
    model = compose([f"model={name}"]).model
    shape = model_shape(model)
    assert shape.parameters == num_parameters(model)
    assert shape.block_parameters == sum(rows * columns for rows, columns in layer_shapes(model, []).values())
    assert 0.9 < (shape.block_parameters + shape.head_parameters) / shape.parameters < 1.01, "the rest is norms and an untied embedding"


def predicted(overrides=(), work=WORK, rates=RATES, labels=()):
    given = compose(["training.tokens_per_pass=4096", "evaluation.tokens_per_pass=16384", *overrides])
    config, method = effective(given), method_of(given)
    spec = adapter_of(config, method, labels)
    cost = forecast(config, method, spec)
    return estimate(config, method, spec, model_shape(given.model, labels), work, rates, cost), cost


@pytest.mark.parametrize("method", ["fed_sb", "fedit", "centralized", "full"])
def test_bytes_equal_the_cost_forecast_and_seconds_are_the_sum_of_the_phases(method):
    found, cost = predicted([f"method={method}", "federation.rounds=3"])
    assert found.num_bytes == cost.totals
    assert found.seconds == sum(phase.seconds for phase in found.phases) > 0
    assert found.peak_bytes > RATES.process_bytes + found.memory["base model"]


def test_twice_the_rounds_double_the_training_and_leave_evaluation_and_initialisation_unchanged():
    one, two = (predicted([f"federation.rounds={rounds}"])[0] for rounds in (3, 6))
    assert two.flops == 2 * one.flops
    times = [{phase.name: phase.seconds for phase in found.phases} for found in (one, two)]
    assert times[1]["training"] == pytest.approx(2 * times[0]["training"])
    assert times[1]["evaluation"] == times[0]["evaluation"]
    assert times[1]["initialisation"] == times[0]["initialisation"]


def test_a_cohort_of_all_clients_trains_faster_than_clients_one_by_one():
    together, alone = (
        {phase.name: phase.seconds for phase in predicted([f"engine.cohort_size={size}"])[0].phases}["training"] for size in (0, 1)
    )
    assert together < alone


def test_memory_grows_with_clients_only_by_their_own_state():
    few, many = (predicted([f"federation.clients={clients}", "training.tokens_per_pass=512"])[0].memory for clients in (25, 100))
    own = "clients' factors, gradients, moments and uploads"
    assert many.pop(own) == 4 * few.pop(own)
    assert many == few


def test_flops_are_proportional_to_local_epochs_and_to_examples():
    one = predicted(["training.local_epochs=1"])[0]
    assert one.flops == pytest.approx(predicted(["training.local_epochs=2"])[0].flops / 2)
    fewer = predicted(["training.local_epochs=1"], replace(WORK, train_examples=5000))[0]
    assert fewer.flops == pytest.approx(one.flops / 2)


ROWS_APART = Work(tokens=30, responses=0, train_examples=9000, questions=1000, prompt=30, answer=0, sequences=2, padded=1.25)
CLASSIFIED = ["model=minilm", "data=sick", "adapter.init=orthogonal", "model.device=cpu"]


def test_rows_to_classify_cost_forward_passes_and_no_generation():
    overrides = [*CLASSIFIED, "federation.rounds=4", "evaluation.every=1"]
    longer = [*overrides, "evaluation.max_new_tokens=500"]
    slower = replace(RATES, decode_flops=0.0, decode_seconds=1e9)
    one, other = predicted(overrides, ROWS_APART, labels=LABELS)[0], predicted(longer, ROWS_APART, slower, LABELS)[0]
    assert one == other, "nothing is generated"
    phase = one.phases[-1]
    shape = model_shape(compose(CLASSIFIED).model, LABELS)
    flops = 2 * 1000 * 30 * (shape.block_parameters + 2 * 384 * 15 * 6)  # scores and values of 15 tokens in 6 blocks 384 wide
    assert phase.seconds == pytest.approx(5 * (1.25 * flops / RATES.flops + 2 * RATES.pass_seconds)), "546 rows of 30 tokens fit in a pass"
    assert phase.detail == "1,000 rows 5 times"


def test_texts_read_apart_attend_to_half_as_many_tokens():
    together = predicted(CLASSIFIED, replace(ROWS_APART, sequences=1), labels=LABELS)[0]
    apart = predicted(CLASSIFIED, ROWS_APART, labels=LABELS)[0]
    tokens = 12 * 25 * 10 * 4 * 30  # rounds, clients, steps, rows
    assert together.flops - apart.flops == pytest.approx(6 * 2 * tokens * 384 * 15 * 6), "three times forward, each with two products"


def test_padding_adds_time_and_memory_but_no_flops():
    tight, wide = (predicted(work=replace(WORK, padded=padded), rates=replace(RATES, pass_seconds=0.0))[0] for padded in (1.0, 1.5))
    assert tight.flops == wide.flops
    of_steps = 12 * 25 * 10 * RATES.client_step_seconds
    assert wide.phases[1].seconds - of_steps == pytest.approx(1.5 * (tight.phases[1].seconds - of_steps))
    small = ["federation.clients=2", "adapter.init=orthogonal", "data.test_examples=1"]
    tight, wide = (predicted(small, replace(WORK, padded=padded, questions=1))[0].memory for padded in (1.0, 1.5))
    largest = "largest of a training pass, initial gradients and evaluation"
    assert wide.pop(largest) > tight.pop(largest)
    assert wide == tight


def test_memory_includes_a_few_copies_of_the_initial_gradients_that_are_sent():
    small = ["adapter.rank=4", "training.tokens_per_pass=64", "evaluation.tokens_per_pass=64"]
    sketched, whole = (predicted([*small, f"adapter.sketch={each}"]) for each in ("true", "false"))
    numbers = whole[1].gradient - sketched[1].gradient
    assert whole[0].peak_bytes - sketched[0].peak_bytes == pytest.approx(GRADIENT_COPIES * 4 * numbers, rel=0.05)

"""Pairs that are classified: tokens, padding, losses, and a head that trains with R, against autograd and Opacus."""

import random

import pytest
import torch
from conftest import (
    CLASSIFIERS,
    KINDS,
    LABELS,
    WithLinearR,
    adapted_classifier,
    own_leaves,
    save_classifier,
    take_private_steps,
    tiny_classifier,
    train_pairs,
)
from torch import nn

from fedsim.choices import Optimizer, Schedule
from fedsim.config import DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from fedsim.core.adapters import adapted_layers, bound, factors
from fedsim.core.forms import HEAD
from fedsim.core.heads import head_layers
from fedsim.core.payload import Layout
from fedsim.models import load_model
from fedsim.seeding import NoiseKey
from fedsim.training.batches import collate
from fedsim.training.budget import TokenBudget
from fedsim.training.cohort import ClientData, private_batches
from fedsim.training.evaluation import evaluate
from fedsim.training.labelled import encode_labelled
from fedsim.training.loss import batch_loss, group_gradients
from fedsim.training.private import PrivateRule, sampling_rate
from fedsim.types import EncodedLabelled, Labelled

KEY = NoiseKey.of_seed(0)

SIZES, NOISE, CLIP = (5, 3, 9), (0.7, 1.3, 0.4), 0.05
SGD = {"optimizer": Optimizer.sgd, "learning_rate": 0.5, "schedule": Schedule.constant, "warmup_ratio": 0.0}
CPU = torch.device("cpu")


def hugging_face_inputs(pair):
    """One pair as Hugging Face takes it, without padding."""
    segments = {"token_type_ids": torch.tensor([pair.segments.tolist()])} if len(pair.segments) else {}
    return {"input_ids": torch.tensor([pair.input_ids.tolist()]), "labels": torch.tensor([pair.label]), **segments}


def cohort(pairs, architecture="bert"):
    return [ClientData(i, pairs(n, seed=i, segments=architecture == "bert")) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_rows_loss_in_a_batch_equals_hugging_faces_loss_of_the_row_alone(architecture, pairs):
    model, rows = adapted_classifier(architecture), pairs(6, segments=architecture == "bert")
    with torch.no_grad():
        together = batch_loss(model, collate(rows, 0, CPU))[1]
        alone = torch.stack([model(**hugging_face_inputs(pair)).loss for pair in rows])
    assert len({pair.num_tokens for pair in rows}) > 1, "rows of one length would not show the padding"
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_cohort_with_a_head_equals_clients_trained_one_by_one(architecture, pairs):
    model, clients = adapted_classifier(architecture), cohort(pairs, architecture)
    for together, client in zip(train_pairs(model, clients), clients, strict=True):
        (alone,) = train_pairs(model, [client])
        torch.testing.assert_close(together.factors, alone.factors, rtol=1e-5, atol=2e-6)
        assert together.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_per_example_gradients_of_head_and_r_equal_one_by_one_autograd(architecture, pairs):
    model, rows = adapted_classifier(architecture), pairs(5, segments=architecture == "bert")
    stacked = {name: tensor.expand(len(rows), *tensor.shape) for name, tensor in factors(model, KINDS).items()}
    _, found = group_gradients(model, stacked, collate(rows, 0, CPU), torch.ones(len(rows)))
    leaves = own_leaves(model)
    for row, pair in enumerate(rows):
        expected = torch.autograd.grad(model(**hugging_face_inputs(pair)).loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-6)


def test_an_adapted_model_with_its_head_equals_the_plain_one_with_the_same_weights(pairs):
    """The head is weight and bias of an ordinary linear layer."""
    model, rows, bare = adapted_classifier(), pairs(4), tiny_classifier()
    for name, layer in adapted_layers(model).items():
        bare.get_submodule(name).weight.data += layer.B @ layer.R @ layer.A
    (head,) = head_layers(model).values()
    bare.classifier.weight.data, bare.classifier.bias.data = head.head[:, :-1].clone(), head.head[:, -1].clone()
    with torch.no_grad():
        torch.testing.assert_close(
            batch_loss(model, collate(rows, 0, CPU))[1], batch_loss(bare, collate(rows, 0, CPU))[1], rtol=1e-5, atol=1e-6
        )


class LinearHead(nn.Module):
    """A head for Opacus, with the bias as the weight of a constant input of one, so that noise is drawn in the same order."""

    def __init__(self, layer):
        super().__init__()
        self.inner = nn.Linear(layer.head.shape[1], layer.head.shape[0], bias=False)
        self.inner.weight.data = layer.head.clone()

    def forward(self, x):
        return self.inner(torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1))


def opacus_alone(data, noise):
    """Trains one client with Opacus in float64, in which Opacus draws the same noise as fedsim."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, trained = adapted_classifier().train(), []
    for layers, wrap in ((adapted_layers(model), WithLinearR), (head_layers(model), LinearHead)):
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(layer))
            trained.append(next(p for p in model.get_submodule(name).parameters() if p.requires_grad))
    private = GradSampleModule(model.double(), loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.5),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        expected_batch_size=len(data.examples) * sampling_rate(len(data.examples), 4),
        generator=KEY.torch("noise", 1, data.client),
    )
    steps = TrainingConfig(batch_size=4, local_steps=3)
    batches = private_batches([e.num_tokens for e in data.examples], steps, KEY.torch("poisson", 1, data.client))
    return take_private_steps(private, optimizer, trained, batches, lambda i: hugging_face_inputs(data.examples[i]))


@pytest.mark.filterwarnings("ignore")  # of Opacus, about its hooks
def test_a_private_cohort_with_a_head_equals_opacus_client_by_client(pairs):
    clients, model = cohort(pairs), adapted_classifier()
    start = Layout.of(factors(model, KINDS)).pack(factors(model, KINDS))
    for result, data, noise in zip(train_pairs(model, clients, PrivateRule(CLIP, NOISE, KEY), **SGD), clients, NOISE, strict=True):
        assert (result.factors - start)[-99:].abs().min() > 0, "the head is 3 x 33"
        torch.testing.assert_close(result.factors, opacus_alone(data, noise), rtol=0, atol=1e-6)


def test_the_clip_norm_applies_to_r_and_head_together(pairs):
    model, everything = adapted_classifier(), {**SGD, "batch_size": 100, "local_steps": 1, "learning_rate": 1.0}
    start = Layout.of(factors(model, KINDS)).pack(factors(model, KINDS))
    (one,) = train_pairs(model, [ClientData(0, pairs(1))], PrivateRule(CLIP, (0.0,), KEY), **everything)
    assert float((one.factors - start).norm()) == pytest.approx(CLIP, rel=1e-3)


def test_checkpointing_changes_nothing_and_a_bfloat16_base_trains_a_float32_head(pairs):
    usual, saved = (train_pairs(adapted_classifier(activation_checkpointing=each), cohort(pairs))[2].factors for each in (False, True))
    assert torch.equal(usual, saved)
    half = adapted_classifier()
    kept = factors(half, ("B", "R", "A", HEAD))
    half.to(torch.bfloat16)
    with bound(half, kept):
        found = train_pairs(half, cohort(pairs))[2].factors
    assert found.dtype == torch.float32
    layout = Layout.of(factors(half, ("R", HEAD)))
    moved, wanted = (each - layout.pack({name: kept[name] for name in layout.names}) for each in (found, usual))
    assert float((moved - wanted).norm()) < 0.3 * float(wanted.norm()), "AdamW's steps follow the signs of small gradients"


def test_pairs_are_encoded_in_the_tokenizers_own_form_and_the_longer_text_is_cut(tmp_path):
    _, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu"), LABELS)
    pair = Labelled("sick", "w0 w1 w2 w3 w4", "w5", "contradiction", LABELS)
    (whole,), (cut,) = (encode_labelled([pair], tokenizer, length) for length in (64, 6))
    assert whole == EncodedLabelled((1, 4, 5, 6, 7, 8, 2, 9, 2), (0,) * 7 + (1,) * 2, label=2)
    assert cut == EncodedLabelled((1, 4, 5, 2, 9, 2), (0,) * 4 + (1,) * 2, label=2)


def one_pair_at_a_time(pair, tokenizer, max_length, apart):
    """The plain way to encode a pair."""
    label, limit = LABELS.index(pair.answer), min(max_length // 2 if apart else max_length, tokenizer.model_max_length)
    if apart:
        first, second = (tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in (pair.premise, pair.hypothesis))
        return EncodedLabelled(first + second, (), label, len(first))
    found = tokenizer(pair.premise, pair.hypothesis, truncation="longest_first", max_length=limit)
    return EncodedLabelled(found["input_ids"], found.get("token_type_ids", ()), label)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("max_length", "limit"), [(64, 64), (12, 64), (1000, 11)])
def test_encoding_many_pairs_gives_the_tokens_of_one_pair_at_a_time(tmp_path, apart, segments, max_length, limit):
    _, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu"), LABELS)
    tokenizer.model_max_length = limit
    if not segments:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rng = random.Random(0)
    make = lambda: " ".join(f"w{rng.randrange(50)}" for _ in range(rng.randrange(1, 15)))  # noqa: E731
    for count in (0, 1, 130):
        chosen = [Labelled("sick", make(), make(), rng.choice(LABELS), LABELS) for _ in range(count)]
        found = encode_labelled(chosen, tokenizer, max_length, apart=apart)
        assert found == [one_pair_at_a_time(pair, tokenizer, max_length, apart) for pair in chosen]
        assert all(len(pair.segments) == pair.num_tokens * (segments and not apart) for pair in found)


def test_accuracy_is_that_of_the_most_likely_label_also_after_out_of_memory(tmp_path):
    model, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu"), LABELS)
    examples = [Labelled("sick", f"w{i} w{i + 1}", " ".join(["w3"] * (1 + i % 4)), LABELS[i % 3], LABELS) for i in range(12)]
    correct, losses = 0, []
    with torch.no_grad():
        for example in examples:
            output = model(**tokenizer(example.premise, example.hypothesis, return_tensors="pt"))
            gold = torch.tensor([LABELS.index(example.answer)])
            correct += int(output.logits.argmax() == gold)
            losses.append(float(nn.functional.cross_entropy(output.logits, gold)))
    for tokens in (15, 10_000):
        found = evaluate(model, tokenizer, examples, EvaluationConfig(tokens_per_pass=tokens), DataConfig())
        assert (found.accuracy, found.num_examples) == (correct / 12, 12)
        assert found.loss == pytest.approx(sum(losses) / 12, rel=1e-5)
    budget = TokenBudget(10_000)

    def check(module, arguments, options):
        if options["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("no memory left")

    model.register_forward_pre_hook(check, with_kwargs=True)
    again = evaluate(model, tokenizer, examples, EvaluationConfig(), DataConfig(), budget=budget)
    assert (again.accuracy, again.num_examples) == (correct / 12, 12)
    assert budget.tokens < 120

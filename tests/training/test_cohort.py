"""A cohort equals its clients trained one by one, for any packing, on every architecture."""

import pytest
import torch
from conftest import ARCHITECTURES, adapted_model

from fedsim.choices import Optimizer, Schedule
from fedsim.config import TrainingConfig
from fedsim.core.adapters import adapted_layers, factors
from fedsim.core.payload import Layout
from fedsim.training.cohort import ClientData, train_cohort

SIZES = (5, 3, 9)  # unequal: the clients take different numbers of steps


def train(model, clients, *, round=1, **options):
    current = factors(model, ("R",))
    layout = Layout.of(current)
    training = TrainingConfig(**{"learning_rate": 1e-2, "batch_size": 2, "local_epochs": 1, "tokens_per_pass": 60, **options})
    return train_cohort(model, layout.pack(current), layout, clients, training, pad_id=0, seed=0, round=round, rounds=2)


def cohort(sequences):
    return [ClientData(i, sequences(n, seed=i)) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cohort_equals_clients_trained_one_by_one(architecture, sequences):
    model, clients = adapted_model(architecture), cohort(sequences)
    for together, client in zip(train(model, clients), clients, strict=True):
        (alone,) = train(model, [client])
        torch.testing.assert_close(together.factors, alone.factors, rtol=1e-5, atol=1e-6)
        assert (together.num_examples, together.num_steps, together.num_tokens) == (alone.num_examples, alone.num_steps, alone.num_tokens)
        assert together.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_step_of_sgd_equals_autograd_of_hugging_faces_loss(architecture, sequences):
    """The oracle knows neither cohorts nor our loss: autograd of Hugging Face's loss in R, one example at a time."""
    model, (client, *_) = adapted_model(architecture), cohort(sequences)
    start = factors(model, ("R",))
    settings = {
        "optimizer": Optimizer.sgd,
        "schedule": Schedule.constant,
        "warmup_ratio": 0.0,
        "local_steps": 1,
        "local_epochs": None,
        "batch_size": 5,
    }
    (result,) = train(model, [client], **settings)
    for layer in adapted_layers(model).values():
        layer.R = layer.R.clone().requires_grad_(True)
    for example in client.examples:
        labels = torch.tensor([[-100] * example.loss_start + example.input_ids[example.loss_start :].tolist()])
        loss = model(input_ids=torch.tensor([example.input_ids.tolist()]), labels=labels, use_cache=False).loss
        (loss / len(client.examples)).backward()
    found = Layout.of(start).unpack(result.factors)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(found[f"{name}.R"], start[f"{name}.R"] - 1e-2 * layer.R.grad, rtol=1e-5, atol=1e-7)


def test_result_does_not_depend_on_tokens_per_pass(sequences):
    model, clients = adapted_model(), cohort(sequences)
    small, large = train(model, clients, tokens_per_pass=15), train(model, clients, tokens_per_pass=10_000)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a.factors, b.factors, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_equal_one_large_batch(sequences):
    model, clients = adapted_model(), cohort(sequences)
    rule = {"optimizer": Optimizer.sgd, "learning_rate": 1.0}  # AdamW would blow up the rounding of gradients near zero
    parts, whole = train(model, clients, batch_size=2, accumulation=2, **rule), train(model, clients, batch_size=4, **rule)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a.factors, b.factors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(architecture, sequences):
    clients = cohort(sequences)
    plain, saved = train(adapted_model(architecture), clients), train(adapted_model(architecture, activation_checkpointing=True), clients)
    assert all(torch.equal(a.factors, b.factors) for a, b in zip(plain, saved, strict=True))


def test_another_clients_content_never_changes_a_clients_result(sequences):
    model, (first, second, third) = adapted_model(), cohort(sequences)
    other = ClientData(1, [*sequences(7, seed=99)])
    before, after = train(model, [first, second, third]), train(model, [first, other, third])
    torch.testing.assert_close(before[0].factors, after[0].factors, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[1].factors, after[1].factors)


def test_the_schedule_continues_in_the_next_round(sequences):
    model, clients = adapted_model(), cohort(sequences)
    settings = {"optimizer": Optimizer.sgd, "schedule": Schedule.linear, "warmup_ratio": 0.0, "group_by_length": False}
    start = Layout.of(factors(model, ("R",))).pack(factors(model, ("R",)))
    moved = [(train(model, clients, round=r, **settings)[0].factors - start).norm() for r in (1, 2)]
    assert moved[1] < 0.6 * moved[0]


def test_a_bfloat16_base_keeps_float32_factors(sequences):
    model = adapted_model()
    model.to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        layer.R, layer.A, layer.B = layer.R.float(), layer.A.float(), layer.B.float()
    clients = cohort(sequences)
    for together, client in zip(train(model, clients), clients, strict=True):
        assert together.factors.dtype == torch.float32
        torch.testing.assert_close(together.factors, train(model, [client])[0].factors, rtol=0, atol=5e-3)


def test_training_leaves_the_models_own_factors_unchanged(sequences):
    model = adapted_model()
    before = {name: tensor.clone() for name, tensor in factors(model, ("B", "R", "A")).items()}
    train(model, cohort(sequences))
    assert all(torch.equal(before[name], tensor) for name, tensor in factors(model, ("B", "R", "A")).items())

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fedsim.choices import Optimizer, Schedule
from fedsim.config import TrainingConfig
from fedsim.training.optimizers import OptimizerState, learning_rate, update

RULES = {
    "adamw": (TrainingConfig(optimizer=Optimizer.adamw, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
    "sgd": (TrainingConfig(optimizer=Optimizer.sgd), lambda p: torch.optim.SGD(p, 1e-2)),
    "momentum": (TrainingConfig(optimizer=Optimizer.sgd, momentum=0.9), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_row_moves_as_with_torchs_own_optimizer(rule):
    training, make = RULES[rule]
    stack, rates = torch.randn(3, 40), [1e-2, 1e-2, 3e-2]  # the last client has fewer steps, hence another schedule
    singles = [row.clone().requires_grad_(True) for row in stack]
    optimizers = [make([single]) for single in singles]
    optimizers[2].param_groups[0]["lr"] = 3e-2
    state = OptimizerState(num_kept=3)
    for _ in range(5):
        gradients = torch.randn(3, 40)
        update(stack, gradients.clone(), state, rates, training)
        for single, gradient, optimizer in zip(singles, gradients, optimizers, strict=True):
            single.grad = gradient
            optimizer.step()
    torch.testing.assert_close(stack, torch.stack([s.detach() for s in singles]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_kept", [0, 1, 5, 40])
@pytest.mark.parametrize("rule", RULES)
def test_clients_with_one_step_keep_no_moments_and_move_the_same(rule, num_kept):
    training, _ = RULES[rule]
    stack, rates = torch.randn(40, 10), [1e-2] * 3 + [3e-2] * 37
    other, state, all_kept = stack.clone(), OptimizerState(num_kept), OptimizerState(num_kept=40)
    for active in (40, num_kept):
        gradients = torch.randn(active, 10)
        update(stack, gradients.clone(), state, rates[:active], training)
        update(other, gradients.clone(), all_kept, rates[:active], training)

    assert torch.equal(stack, other)
    assert all(len(moment) == num_kept for moment in state.moments)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_have_finished_do_not_move(rule):
    training, _ = RULES[rule]
    stack, state = torch.randn(3, 10), OptimizerState(num_kept=3)
    update(stack, torch.randn(3, 10), state, [1e-2] * 3, training)
    last, moments = stack[2].clone(), [m[2].clone() for m in state.moments]
    update(stack, torch.randn(2, 10), state, [1e-2] * 2, training)
    assert torch.equal(stack[2], last)
    assert all(torch.equal(m[2], before) for m, before in zip(state.moments, moments, strict=True))


@pytest.mark.parametrize(
    ("schedule", "oracle"), [(Schedule.linear, get_linear_schedule_with_warmup), (Schedule.cosine, get_cosine_schedule_with_warmup)]
)
def test_schedule_equals_transformers_with_the_warm_up_one_step_ahead(schedule, oracle):
    training = TrainingConfig(learning_rate=0.5, schedule=schedule, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    scheduler = oracle(optimizer, 5, 50)
    for step in range(50):
        expected = optimizer.param_groups[0]["lr"]
        if step >= 5:
            assert learning_rate(step, 50, training) == pytest.approx(expected)
        else:  # the first step is not wasted at rate zero
            assert learning_rate(step, 50, training) == pytest.approx(0.5 * (step + 1) / 5)
        optimizer.step()
        scheduler.step()


def test_constant_schedule_stays_at_its_peak():
    training = TrainingConfig(learning_rate=0.5, schedule=Schedule.constant, warmup_ratio=0.0)
    assert {learning_rate(step, 10, training) for step in range(10)} == {0.5}

"""The oracle is Flower: its own strategies run round after round on real messages."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from fedsim.core.server_optimizers import SERVER_OPTIMIZERS, ServerOptions

OPTIONS = ServerOptions(learning_rate=0.3, momentum=0.8, beta2=0.95, tau=1e-2)
SIZE, ROUNDS, WEIGHTS = 200, 6, [5.0, 1.0, 12.0]
ADAPTIVE = {"eta": OPTIONS.learning_rate, "tau": OPTIONS.tau}
MOMENTS = {"beta_1": OPTIONS.momentum, "beta_2": OPTIONS.beta2}
ORACLES = {
    "fedavg": lambda: FedAvgM(server_learning_rate=OPTIONS.learning_rate, server_momentum=0.0),
    "fedavgm": lambda: FedAvgM(server_learning_rate=OPTIONS.learning_rate, server_momentum=OPTIONS.momentum),
    "fedadagrad": lambda: FedAdagrad(**ADAPTIVE),
    "fedyogi": lambda: FedYogi(**ADAPTIVE, **MOMENTS),
    "fedadam": lambda: FedAdam(**ADAPTIVE, **MOMENTS),
}


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Flower makes messages only in a process that knows its task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class ThreeNodes:
    """The part of a Grid that `configure_train` uses."""

    def get_node_ids(self):
        return [1, 2, 3]


def start():
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def replies(current, server_round):
    """What three clients reply to `current`: each pulls unevenly towards a target of its own."""
    generator = torch.Generator().manual_seed(server_round)
    return [current + 0.3 * torch.randn(SIZE, generator=generator) * torch.linspace(0, 2, SIZE) - 0.1 * current for _ in WEIGHTS]


def flowers_trajectory(strategy, rounds=ROUNDS):
    arrays, trajectory = ArrayRecord({"x": Array(start().numpy())}), []
    for server_round in range(1, rounds + 1):
        list(strategy.configure_train(server_round, arrays, ConfigRecord(), ThreeNodes()))
        current = torch.from_numpy(arrays["x"].numpy()).float()
        messages = [
            Message(
                RecordDict({"arrays": ArrayRecord({"x": Array(flat.numpy())}), "m": MetricRecord({"num-examples": weight})}), 1, "train"
            )
            for weight, flat in zip(WEIGHTS, replies(current, server_round), strict=True)
        ]
        arrays, _ = strategy.aggregate_train(server_round, messages)
        trajectory.append(torch.from_numpy(np.array(arrays["x"].numpy())).float())
    return trajectory


def trajectory_of(name, options=OPTIONS, rounds=ROUNDS):
    current, state, trajectory = start(), {}, []
    for server_round in range(1, rounds + 1):
        mean = np.average(torch.stack(replies(current, server_round)).double(), axis=0, weights=WEIGHTS)
        current, state = SERVER_OPTIMIZERS[name].step(current, torch.from_numpy(mean).float(), state, options)
        trajectory.append(current)
    return trajectory


def test_every_optimizer_has_an_oracle():
    assert set(ORACLES) == set(SERVER_OPTIMIZERS)
    assert all(name == rule.name for name, rule in SERVER_OPTIMIZERS.items())


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_every_round_equals_flowers_own_strategy(name):
    for mine, flowers in zip(trajectory_of(name), flowers_trajectory(ORACLES[name]()), strict=True):
        torch.testing.assert_close(mine, flowers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_different_optimizers_give_different_trajectories(name):
    last = flowers_trajectory(ORACLES[name]())[-1]
    assert all((trajectory_of(other)[-1] - last).abs().max() > 1e-2 for other in SERVER_OPTIMIZERS if other != name)


def test_fedavg_with_learning_rate_one_returns_the_mean_itself():
    mean = torch.randn(SIZE)
    result, state = SERVER_OPTIMIZERS["fedavg"].step(start(), mean, {}, ServerOptions())
    assert result is mean
    assert state == {}


def test_the_default_options_are_flowers_fedavg():
    for mine, flowers in zip(trajectory_of("fedavg", ServerOptions()), flowers_trajectory(FedAvg()), strict=True):
        torch.testing.assert_close(mine, flowers, rtol=1e-5, atol=1e-6)


def test_fedavgm_without_momentum_is_fedavg():
    options = ServerOptions(learning_rate=0.5, momentum=0.0)
    for mine, plain in zip(trajectory_of("fedavgm", options), trajectory_of("fedavg", options), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_mean_equal_to_the_start_changes_nothing(name):
    result, _ = SERVER_OPTIMIZERS[name].step(start(), start(), {}, OPTIONS)
    assert torch.equal(result, start())


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_step_changes_none_of_its_arguments(name):
    rule, mean = SERVER_OPTIMIZERS[name], start() + 1
    current, state = rule.step(start(), mean, {}, OPTIONS)
    before = {key: value.clone() for key, value in state.items()}
    again, copy = rule.step(current, mean, state, OPTIONS), rule.step(current.clone(), mean.clone(), before, OPTIONS)
    assert torch.equal(mean, start() + 1)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert torch.equal(again[0], copy[0])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_saved_state_continues_bit_for_bit(name):
    from safetensors.torch import load, save

    rule, means = SERVER_OPTIMIZERS[name], [torch.randn(SIZE) for _ in range(2)]
    current, state = rule.step(start(), means[0], {}, OPTIONS)
    assert set(state) == rule.state_names
    loaded = load(save(state)) if state else {}
    assert torch.equal(rule.step(current, means[1], loaded, OPTIONS)[0], rule.step(current, means[1], state, OPTIONS)[0])


def test_a_state_of_another_optimizer_or_size_is_refused():
    _, state = SERVER_OPTIMIZERS["fedavgm"].step(start(), start() + 1, {}, OPTIONS)
    with pytest.raises(ValueError, match="state of fedadam"):
        SERVER_OPTIMIZERS["fedadam"].step(start(), start(), state, OPTIONS)
    with pytest.raises(ValueError, match="another adapter"):
        SERVER_OPTIMIZERS["fedavgm"].step(torch.zeros(3), torch.zeros(3), state, OPTIONS)


@pytest.mark.parametrize("mean", [torch.zeros(1), torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, 1)])
def test_a_mean_of_another_shape_or_type_is_refused(mean):
    with pytest.raises(ValueError, match="of one shape"):
        SERVER_OPTIMIZERS["fedavg"].step(start(), mean, {}, ServerOptions())


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"momentum": 1.0}, {"beta2": -0.1}, {"tau": 0.0}, {"tau": float("nan")}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        ServerOptions(**wrong)

"""New bases during a run (`adapter.refresh_every`): the resulting model, the workers' copies of it, and the charges."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rounds import RANK, RATE, SCALING, Rounds, of_method
from test_methods import Oracle

from clients.app import app
from fedsim.choices import Init
from fedsim.core.adapters import base_weights
from fedsim.core.initialization import from_seed
from fedsim.core.participation import gradient_samples
from fedsim.flower import transfer
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.server import Run
from fedsim.flower.strategy import FedsimStrategy
from fedsim.progress import Progress
from fedsim.run_folder import RunFolder
from fedsim.seeding import numpy_generator
from fedsim.session import forget_session, open_session

INITS = [Init.orthogonal, Init.weight_svd, Init.gradient]
WHOLE, SQUARES, BASES = 192 * 192 + 192 * 512, 2 * RANK**2, RANK * (192 + 192 + 192 + 512)  # numbers in two layers


class Refreshed:
    """A run through the server that refreshes after every round; `before` and `after` hold a snapshot around each refresh."""

    def __init__(self, run, session, grid):
        self.run, self.session, self.grid, self.before, self.after = run, session, grid, {}, {}
        self.state = run._initial()
        self.strategy = FedsimStrategy(session, run._given, self.state.ledger, self.state.shared)
        refresh = run._refresh

        def watched(state):
            self.before[state.round] = self.snapshot()
            refresh(state)
            self.after[state.round] = self.snapshot()

        run._refresh = watched

    def snapshot(self):
        shared = self.state.shared
        clones = [{name: tensor.clone() for name, tensor in each.items()} for each in (shared.factors, shared.folded)]
        return *clones, shared.digests()

    def next(self):
        self.run._next_round(self.state, self.strategy)


@contextmanager
def refreshed(init, folder, init_samples=6, every=1, **sections):
    adapter = {"init": init, "refresh_every": every, "init_samples": init_samples}
    training = {"local_steps": 1, "learning_rate": 0.02 if init is Init.gradient else RATE}  # the first step along the signs is large
    config = of_method("fed_sb", adapter=adapter, federation={"rounds": 5}, training=training, **sections)
    config = replace(config, run_dir=str(folder))
    session, grid = open_session(config), InProcessGrid(app)
    with Progress(5, [], quiet=True) as progress, RunFolder.open(config) as opened:
        yield Refreshed(Run(session, config, grid, grid.contexts, None, opened, progress), session, grid)


@pytest.mark.parametrize("init", INITS)
def test_a_refresh_folds_the_update_into_the_weights_and_takes_new_orthonormal_bases(init, tmp_path):
    with refreshed(init, tmp_path / "run") as run:
        original = {name: weight.double() for name, weight in Oracle(run.session).base.items()}
        run.next()
        run.next()
        for number in (1, 2):
            (old, former, _), (new, folded, _) = run.before[number], run.after[number]
            for layer in run.session.spec.layers:
                B, R, A = (old[f"{layer}.{kind}"].double() for kind in "BRA")
                expected = former.get(layer, torch.zeros(())).double() + SCALING * B @ R @ A
                assert (SCALING * B @ R @ A).abs().max() > 1e-5, "an update of nothing would show nothing"
                torch.testing.assert_close(folded[layer].double(), expected, rtol=0, atol=1e-6)
                left, right = new[f"{layer}.B"], new[f"{layer}.A"]
                assert (left - B).norm() > 1e-3
                assert (right - A).norm() > 1e-3
                torch.testing.assert_close(left.T @ left, torch.eye(RANK), rtol=0, atol=1e-5)
                torch.testing.assert_close(right @ right.T, torch.eye(RANK), rtol=0, atol=1e-5)
        run.session.install_state(run.state.shared)
        for layer, weight in base_weights(run.session.model).items():
            torch.testing.assert_close(weight.double(), original[layer] + run.after[2][1][layer].double(), rtol=0, atol=1e-6)


def test_a_refresh_restarts_from_zero_r_or_the_svd_of_the_new_weights(tmp_path):
    with refreshed(Init.orthogonal, tmp_path / "orthogonal") as run:
        run.next()
        assert not any(tensor.any() for name, tensor in run.after[1][0].items() if name.endswith(".R")), "the model is unchanged"
    with refreshed(Init.weight_svd, tmp_path / "weights") as run:
        run.next()
        new, folded, _ = run.after[1]
        for layer, weight in Oracle(run.session).base.items():
            u, _, vt = torch.linalg.svd(weight + folded[layer].double())
            top = (u[:, :RANK].T @ new[f"{layer}.B"].double()).abs()
            torch.testing.assert_close(top, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-4)
            torch.testing.assert_close((new[f"{layer}.A"].double() @ vt[:RANK].T).abs(), torch.eye(RANK).double(), rtol=0, atol=1e-4)
            assert new[f"{layer}.R"].abs().max() < 1e-4


def gradient_signs(oracle, changes):
    """Returns the signs of the summed gradients of the clients' six examples at the weights base + changes."""
    total = dict.fromkeys(oracle.names, 0)
    for client in range(3):
        count = len(oracle.session.client_data(client).examples)
        chosen = numpy_generator(0, "init", client).choice(count, 2, replace=False).tolist()
        oracle.batch = chosen
        for layer, gradient in oracle.gradients(changes, client, 1, 0).items():
            total[layer] = total[layer] + gradient
    return {layer: gradient.sign() for layer, gradient in total.items()}


def test_bases_from_data_use_the_gradient_at_the_new_weights(tmp_path, monkeypatch):
    with refreshed(Init.gradient, tmp_path / "run") as run:
        run.next()
        run.next()
        new, folded, _ = run.after[2]
        oracle = Oracle(run.session)
        monkeypatch.setattr("test_methods.local_batches", lambda *facts, **more: [oracle.batch])
        here, there = (gradient_signs(oracle, folds) for folds in (folded, dict.fromkeys(folded, 0.0)))
        for layer in oracle.names:
            update = run.session.spec.update(new, layer).double()
            distances = []
            for signs in (here, there):
                u, s, vt = torch.linalg.svd(-0.02 * signs[layer])
                distances.append(float((update - (u[:, :RANK] * s[:RANK]) @ vt[:RANK]).norm() / update.norm()))
            assert distances[0] < 0.02 < 5 * 0.02 < distances[1], distances


@pytest.mark.parametrize("init", INITS)
def test_a_worker_in_another_process_has_the_same_model(init, tmp_path, monkeypatch):
    """The worker "own" follows by the increments it is sent; "fresh" starts without state in every round."""
    with refreshed(init, tmp_path / "alike") as shared_process:
        for _ in range(3):
            shared_process.next()
    increments = []
    monkeypatch.setattr(transfer, "_updates", lambda *facts, original=transfer._updates: increments.append(1) or original(*facts))
    for worker in ("own", "fresh"):
        forget_session()
        with refreshed(init, tmp_path / worker) as separate:
            forget_session()  # the worker opens the next session
            for _ in range(3):
                if worker == "fresh":
                    forget_session()
                separate.next()
            assert separate.after[3][2] == shared_process.after[3][2], "bit for bit"
            if worker == "fresh":
                forget_session()
            separate.strategy.exchange(4, separate.grid)
            theirs = open_session(separate.run._given)
            assert theirs is not separate.session
            assert {kind: theirs.digests[kind] for kind in "WBRA"} == {kind: separate.after[3][2][kind] for kind in "WBRA"}
            separate.session.install_folded(separate.state.shared.folded, separate.state.shared.tag)
            ours = base_weights(separate.session.model)
            assert all(torch.equal(weight, ours[layer]) for layer, weight in base_weights(theirs.model).items())
        assert worker == "fresh" or len(increments) == 3, "a worker that follows is not sent the whole of what is folded"
    forget_session()


def test_a_worker_with_folded_weights_of_an_earlier_run_starts_from_the_base_weights():
    clean, other = (Rounds(of_method("fed_sb")) for _ in range(2))
    clean.next()
    other.session.install_folded({layer: torch.ones(shape) for layer, shape in other.spec.layers.items()}, "of an earlier run")
    other.strategy.exchange(1, other.grid)
    assert torch.equal(other.flat("R"), clean.flat("R"))


def charges(run, number):
    """Returns the numbers sent to clients in a round and the refresh after it, as {client: {purpose: numbers}}."""
    found = {}
    for row in run.state.ledger.rows():
        if (row["round"], row["direction"]) == (number, "downlink"):
            mine = found.setdefault(row["client"], {})
            mine[row["purpose"]] = mine.get(row["purpose"], 0) + row["parameters"]
    return found


@pytest.mark.parametrize("init", [Init.orthogonal, Init.weight_svd])
def test_derived_bases_cost_nothing_and_a_client_is_charged_the_folds_it_lacks(init, tmp_path):
    with refreshed(init, tmp_path / "run") as run:
        run.strategy.asking.participants = {1: [0, 1], 2: [1, 2], 3: [0, 1]}.get
        for _ in range(3):
            run.next()
        assert charges(run, 1) == {client: {"adapter": SQUARES} for client in (0, 1)}
        assert charges(run, 2) == {client: {"adapter": SQUARES, "fold": SQUARES} for client in (1, 2)}
        assert charges(run, 3) == {0: {"adapter": SQUARES, "fold": WHOLE}, 1: {"adapter": SQUARES, "fold": SQUARES}}, "0 missed a fold"


def test_bases_from_data_are_charged_with_their_gradients_at_each_refresh(tmp_path):
    with refreshed(Init.gradient, tmp_path / "run", init_samples=2) as run:
        run.strategy.asking.participants = {1: [1, 2], 2: [1, 2], 3: [0, 1]}.get
        assert gradient_samples(run.session.config) == {0: 1, 1: 1}
        for _ in range(3):
            run.next()
        uplinks = [row for row in run.state.ledger.rows() if row["purpose"] == "initial_gradient"]
        assert [(row["round"], row["client"], row["parameters"]) for row in uplinks] == [(n, c, WHOLE) for n in range(4) for c in (0, 1)]
        first, fold = {"bases": BASES, "adapter": SQUARES}, {"fold": SQUARES}
        assert charges(run, 0) == {}
        assert charges(run, 1) == {0: {"fold": WHOLE}, 1: first | fold, 2: first}, "0 has never seen the bases of round 1"
        assert charges(run, 2) == {0: {"fold": WHOLE}, 1: first | fold, 2: first | fold}, "2 gave no gradient, and folds in the next round"
        assert charges(run, 3) == {0: first | fold, 1: first | fold}


def test_seeded_bases_stay_the_same_between_refreshes():
    session = open_session(of_method("fed_sb", adapter={"refresh_every": 2}))
    B = [session.derived_factors(round_)[f"{next(iter(session.spec.layers))}.B"] for round_ in (1, 2, 3, 4, 5)]
    assert [torch.equal(former, later) for former, later in pairwise(B)] == [True, False, True, False]
    assert torch.equal(B[0], from_seed(session.spec, {}, 0)[f"{next(iter(session.spec.layers))}.B"]), "as without a refresh"


def test_a_refresh_clears_the_server_moments(tmp_path):
    with refreshed(Init.orthogonal, tmp_path / "kept", server={"optimizer": "fedavgm"}, every=2) as run:
        run.next()
        assert run.state.shared.moments, "there are none to clear"
        run.next()
        assert run.state.shared.moments == {}

"""Runs with state besides the factors (folded weights, client state, moments, control variates) resume bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from rounds import changed, of_method

from clients.app import app
from fedsim.checkpoints import Store, load, saved
from fedsim.choices import Init, Mode
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower import results
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.reading import Reader
from fedsim.flower.server import serve
from fedsim.session import forget_session
from fedsim.training import loss
from fedsim.training.loss import batch_loss

MOMENTS = {"optimizer": "fedadam", "learning_rate": 0.01}
OPTIONS = {
    "refresh from data": of_method("fed_sb", adapter={"refresh_every": 1, "init": Init.gradient, "init_samples": 3}),
    "refresh from a seed": of_method("fed_sb", adapter={"refresh_every": 2}),
    "flora with ranks": of_method("flora", adapter={"rank": None}, federation={"ranks": {2: 1.0, 4: 1.0}}),
    "fedbuff": of_method("fed_sb", federation={"network": "broadband", "mode": Mode.fedbuff, "concurrency": 4, "buffer": 2}),
    "fedex_lora": of_method("fedex_lora"),
    "fedsa_lora": of_method("fedsa_lora"),
    "scaffold": of_method("fed_sb", training={"scaffold": True}),
    "moments and residues": of_method("fed_sb", server=MOMENTS, compression={"name": "top_k", "density": 0.3, "error_feedback": True}),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("curves_png", "partition_png", "diagnosis_png", "network_png"):
        monkeypatch.setattr(results, name, lambda *facts: b"")


def in_folder(config, folder, **options):
    config = changed(config, data={"test_examples": 2}, training={"local_steps": 1}, evaluation={"max_new_tokens": 1})
    config = changed(config, federation={"clients": 4, "fraction": 0.75, "rounds": 3})
    return replace(config, run_dir=str(folder), **options)


def interrupt(monkeypatch, call):
    """Simulates Ctrl-C while the server reads upload number `call`."""
    original, calls = Reader._flat, iter(range(1000))

    def read(self, *arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Reader, "_flat", read)


def outcome(folder):
    summary = json.loads((folder / "summary.json").read_text())
    last = load(saved(folder / "checkpoints")[-1])
    return (
        {key: summary[key] for key in ("adapter_digest", "evaluation", "communication", "network")},
        last.tensors,
        last.state["state"]["held"],
    )


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (0, 1)])
@pytest.mark.parametrize("name", ["fedsa_lora", "scaffold", "moments and residues"])
def test_client_state_is_restored_with_another_number_of_workers_or_refused(name, before, after, tmp_path, monkeypatch):
    whole, part = (in_folder(OPTIONS[name], tmp_path / folder) for folder in ("whole", "part"))
    grid = InProcessGrid(app)
    serve(grid, whole, grid.contexts, quiet=True)
    grid = InProcessGrid(app, before or 1)
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * 3 + 1)
        with pytest.raises(KeyboardInterrupt):
            serve(grid, part, grid.contexts if before else None, quiet=True)
    grid, again = InProcessGrid(app, after), replace(part, resume=True)
    if not before:
        with pytest.raises(UserError, match="Flower's own simulation, which forgets them"):
            serve(grid, again, quiet=True)
        return
    serve(grid, again, grid.contexts, quiet=True)
    tensors = [load(saved(tmp_path / folder / "checkpoints")[-1]).tensors for folder in ("whole", "part")]
    tensors = [{key.rpartition("memory/")[2].partition("/")[2] or key: value for key, value in each.items()} for each in tensors]
    assert tensors[0].keys() == tensors[1].keys()
    for key, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path, monkeypatch):
    run(in_folder(config, tmp_path / "whole"), quiet=True)
    with monkeypatch.context() as patch:
        interrupt(patch, 2 * 3 + 1)  # the second upload of the third round: client state is already written
        with pytest.raises(KeyboardInterrupt):
            run(in_folder(config, tmp_path / "run"), quiet=True)
    forget_session()  # as in a new process
    run(in_folder(config, tmp_path / "run", resume=True), quiet=True)
    (expected, tensors, held), (found, resumed, resumed_held) = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert found == expected
    assert resumed_held == held
    assert tensors.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())
    assert any(not name.startswith("factor/") for name in tensors), "a state of factors alone would show nothing"


def test_halved_passes_stay_halved_when_a_run_resumes_with_more_memory(tmp_path, monkeypatch):
    def scarce(model, batch, weights):
        if batch.input_ids.numel() > 200:
            raise torch.OutOfMemoryError
        return batch_loss(model, batch, weights)

    config = of_method("fed_sb")
    with monkeypatch.context() as patch:
        patch.setattr(loss, "batch_loss", scarce)
        run(in_folder(config, tmp_path / "whole"), quiet=True)
        forget_session()
        interrupt(patch, 2 * 3 + 1)
        with pytest.raises(KeyboardInterrupt):
            run(in_folder(config, tmp_path / "run"), quiet=True)
    forget_session()
    run(in_folder(config, tmp_path / "run", resume=True), quiet=True)
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    budgets = {event["kind"]: event["tokens_per_pass"] for event in events if "tokens_per_pass" in event}
    assert budgets["initialized"] >= 1024 > 200 >= budgets["passes_halved"] == budgets["resumed"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    config = of_method("fed_sb")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(in_folder(config, tmp_path / "run"), quiet=True)
    last = load(saved(tmp_path / "run/checkpoints")[-1])
    last.state["state"]["format"] = 1
    Store(tmp_path / "run/checkpoints", 2).writing(last)()
    with pytest.raises(UserError, match=r"Expected a checkpoint of format 2, got format 1.*overwrite=true"):
        run(in_folder(config, tmp_path / "run", resume=True), quiet=True)
    run(in_folder(config, tmp_path / "run", overwrite=True), quiet=True)

"""The run folder: which runs may use it, what survives a kill at any moment, and what a resumed run finds."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsim.checkpoints import Checkpoint, Store, saved
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.events import read_events
from fedsim.files import TEMPORARY, atomic_write, atomically
from fedsim.occupancy import check
from fedsim.plain import to_dict
from fedsim.run_folder import RunFolder

fork = multiprocessing.get_context("fork")


def config_of(folder: Path, **changes: Any) -> Config:
    return replace(Config(), run_dir=str(folder), **changes)


def tensors_of(round_: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(round_)
    values = torch.randn(50, 20, generator=generator)
    return {"R": values, "half": values[0].bfloat16(), "scalar": torch.tensor(round_), "none": torch.zeros(0, 3)}


def rounds_of(folder: Path) -> list[int]:
    return [event["round"] for event in read_events(folder / "events.jsonl") if event["kind"] == "round"]


def play_rounds(folder: RunFolder, rounds: range | count) -> None:
    for round_ in rounds:
        folder.event("round", round=round_, train_loss=1 / round_, clients=list(range(25)))
        folder.save_checkpoint(round_, tensors_of(round_), {"next": round_ + 1, "loss": 1 / round_})


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A run that ended after its third round without a summary."""
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        folder.event("run_started")
        play_rounds(folder, range(1, 4))
    return tmp_path / "run"


def test_opening_a_new_run_writes_its_configuration_and_manifest(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", seed=7)
    with RunFolder.open(config) as folder:
        assert yaml.safe_load((folder.folder / "config.yaml").read_text()) == to_dict(config)
        manifest = json.loads((folder.folder / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["hardware"]["cores"] >= 1
    assert manifest["hardware"]["memory_bytes"] > 2**28
    assert set(manifest["commit"] or {}) <= {"id", "dirty"}


def test_runs_without_a_run_dir_that_start_in_the_same_second_get_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 3, 4, 5, 6, 7)
    with RunFolder.open(Config(), now=now) as first, RunFolder.open(Config(), now=now) as second:
        assert str(first.folder) == "runs/2026-03-04/05-06-07-fed_sb"
        assert str(second.folder) == "runs/2026-03-04/05-06-07-fed_sb-2"


def test_a_folder_in_use_is_refused_with_any_options(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    with RunFolder.open(config):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
                RunFolder.open(replace(config, **options))
    RunFolder.open(replace(config, resume=True)).close()


def test_an_interrupted_or_finished_run_is_refused_and_left_unchanged(interrupted: Path) -> None:
    before = tree(interrupted)
    with pytest.raises(UserError, match=r"interrupted run.*resume=true.*overwrite=true"):
        RunFolder.open(config_of(interrupted))
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        folder.finish({"method": "fed_sb"})
    with pytest.raises(UserError, match=r"finished run.*overwrite=true"):
        RunFolder.open(config_of(interrupted))
    changed, told = tree(interrupted), {"manifest.json", "journal.jsonl"}  # these record that it was resumed
    assert {name: changed[name] for name in before.keys() - told} == {name: before[name] for name in before.keys() - told}
    assert len(changed["journal.jsonl"].splitlines()) == len(before["journal.jsonl"].splitlines()) + 1


def test_overwrite_replaces_a_run_and_leaves_nothing_of_it(interrupted: Path) -> None:
    (interrupted / "curves.png").write_bytes(b"old")
    with RunFolder.open(config_of(interrupted, overwrite=True, seed=1)) as folder:
        assert folder.last_checkpoint() is None
        assert list(folder.events()) == []
    assert set(tree(interrupted)) == {"config.yaml", "manifest.json", "events.jsonl", "journal.jsonl"}


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "adapter"])
def test_a_folder_with_foreign_files_is_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError):
            RunFolder.open(config_of(tmp_path, **options))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def fail_with_user_error(config: Config, play: Callable[[RunFolder], None] = lambda folder: None) -> None:
    with RunFolder.open(config) as folder:
        folder.event("started")
        folder.record("started")
        play(folder)
        raise UserError("too short")


def test_a_user_error_before_the_first_checkpoint_removes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for config in (config_of(tmp_path / "new" / "run"), config_of(tmp_path / "empty"), Config()):
        with pytest.raises(UserError, match="too short"):
            fail_with_user_error(config)
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_mistake_removes_only_files_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    with pytest.raises(UserError, match="too short"):
        fail_with_user_error(config_of(run), lambda folder: (folder.folder / "notes.txt").touch())
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_user_error_after_the_first_checkpoint_or_in_a_resumed_run_keeps_the_run(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too short"):
        fail_with_user_error(config_of(tmp_path / "late"), lambda folder: play_rounds(folder, range(1, 2)))
    assert len(saved(tmp_path / "late" / "checkpoints")) == 1
    with pytest.raises(UserError, match="too short"):
        fail_with_user_error(config_of(interrupted, resume=True))
    assert rounds_of(interrupted) == [1, 2, 3]


def test_a_folder_is_checked_without_being_locked(interrupted: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    check(config_of(tmp_path / "new"))
    check(config_of(interrupted, resume=True))
    check(config_of(interrupted, overwrite=True, seed=5))
    for config, reason in (
        (config_of(interrupted), "interrupted run"),
        (config_of(interrupted, resume=True, seed=5), "seed=5"),
        (config_of(tmp_path / "new", resume=True), "to resume"),
    ):
        with pytest.raises(UserError, match=reason):
            check(config)
    with RunFolder.open(config_of(interrupted, resume=True)), pytest.raises(UserError, match="in use by process"):
        check(config_of(interrupted))
    assert tree(tmp_path).keys() == before.keys()


def test_a_foreign_file_in_a_run_folder_stops_overwrite(interrupted: Path) -> None:
    (interrupted / "notes.txt").write_text("keep me")
    before = tree(interrupted)
    with pytest.raises(UserError, match=r"notes\.txt"):
        RunFolder.open(config_of(interrupted, overwrite=True))
    assert tree(interrupted) == before


def test_a_run_dir_that_is_a_file_or_cannot_be_created_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as caught:
            RunFolder.open(config_of(folder))
        assert "\n" not in str(caught.value)


def test_resume_without_a_run_is_refused_and_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for config in (replace(Config(), resume=True), config_of(tmp_path / "new", resume=True), config_of(tmp_path / "empty", resume=True)):
        with pytest.raises(UserError, match="run_dir="):
            RunFolder.open(config)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_resuming_with_options_that_change_the_result_is_refused_naming_each(interrupted: Path) -> None:
    config = config_of(interrupted, resume=True, seed=5)
    config.training.learning_rate = 0.5
    with pytest.raises(UserError, match=r"seed=5 \(run: 0\), training.learning_rate=0.5 \(run: 0.03\)"):
        RunFolder.open(config)


def test_resume_may_change_the_engine_and_the_token_cache(interrupted: Path) -> None:
    config = config_of(interrupted, resume=True)
    config.engine.cohort_size = 5
    config.data.token_cache = False
    with RunFolder.open(config) as folder:
        found = folder.last_checkpoint()
        assert found is not None
        assert found.round == 3
    assert len(json.loads((interrupted / "manifest.json").read_text())["resumed"]) == 1


def test_resume_of_a_finished_run_returns_its_summary(interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        assert folder.finished_summary is None
        folder.finish({"rounds": 3, "loss": float("nan")})
    before = tree(interrupted)
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        assert folder.finished_summary == {"rounds": 3, "loss": None}
    assert tree(interrupted) == before


def test_resume_before_the_first_checkpoint_restarts_without_the_old_events(tmp_path: Path) -> None:
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        folder.event("run_started")
    with RunFolder.open(config_of(tmp_path / "run", resume=True)) as folder:
        assert folder.last_checkpoint() is None
        assert list(folder.events()) == []


def test_a_run_killed_before_its_configuration_was_written_restarts_with_any_options(tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("resume", {"resume": True}), ("overwrite", {"overwrite": True})):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.lock").touch()
        (folder / "checkpoints" / "round_0009.safetensors").write_bytes(b"half removed")
        with RunFolder.open(config_of(folder, **options)) as run:
            assert run.last_checkpoint() is None


def test_checkpoints_restore_tensors_and_state_bit_for_bit_and_only_the_last_are_kept(interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        found = folder.last_checkpoint()
    assert found is not None
    assert found.state == {"next": 4, "loss": 1 / 3}
    assert found.tensors.keys() == tensors_of(3).keys()
    for name, tensor in tensors_of(3).items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert sorted(path.name for path in (interrupted / "checkpoints").iterdir()) == ["round_0002.safetensors", "round_0003.safetensors"]


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999, "cut"])
def test_a_damaged_checkpoint_is_set_aside_with_an_event_and_the_previous_one_used(interrupted: Path, place: float | str) -> None:
    path = interrupted / "checkpoints" / "round_0003.safetensors"
    content = bytearray(path.read_bytes())
    if isinstance(place, float):
        content[int(place * len(content))] ^= 1
    path.write_bytes(content if isinstance(place, float) else content[: len(content) // 2])
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        found = folder.last_checkpoint()
        events = list(folder.events())
    assert found is not None
    assert found.round == 2
    assert rounds_of(interrupted) == [1, 2]
    assert [event["kind"] for event in events].count("damaged_checkpoint") == 1
    assert (interrupted / "checkpoints" / "round_0003.safetensors.damaged").exists()


def test_events_after_the_checkpoint_are_cut_but_the_history_of_the_run_is_kept(interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        folder.event("resumed", round=3)
        folder.event("round", round=4)
        folder.event("interrupted", round=4)
    with open(interrupted / "events.jsonl", "ab") as file:
        file.write(b'{"time": "torn')
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        kinds = [event["kind"] for event in folder.events()]
        play_rounds(folder, range(4, 5))
    assert kinds == ["run_started", *["round", "checkpoint"] * 3, "resumed", "interrupted"]
    assert rounds_of(interrupted) == [1, 2, 3, 4]


def test_a_torn_event_before_a_damaged_checkpoint_harms_no_other_event(interrupted: Path) -> None:
    path = interrupted / "checkpoints" / "round_0003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with open(interrupted / "events.jsonl", "ab") as file:
        file.write(b'{"time": "torn')
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        found = folder.last_checkpoint()
        kinds = [event["kind"] for event in folder.events()]
    assert found is not None
    assert found.round == 2
    assert kinds == ["run_started", *["round", "checkpoint"] * 2, "damaged_checkpoint"]
    assert b"torn" not in (interrupted / "events.jsonl").read_bytes()


def test_a_failed_resumption_raises_its_cause_and_unlocks_the_folder(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("fedsim.events.atomic_write", full)
        with pytest.raises(OSError, match="No space left on device"):
            RunFolder.open(config_of(interrupted, resume=True))
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        assert folder.last_checkpoint() is not None


def test_an_event_with_numbers_that_are_not_finite_is_still_json(interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        folder.event("round", train_loss=float("nan"), weights=[1.0, float("inf")])
    last = (interrupted / "events.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail) | {"time": ""} == {
        "time": "",
        "kind": "round",
        "train_loss": None,
        "weights": [1.0, None],
    }


def test_a_name_outside_the_contents_of_a_run_folder_is_refused(interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        assert folder.write_bytes("adapter/config.json", b"{}").read_bytes() == b"{}"
        with pytest.raises(ValueError, match="CONTENTS"):
            folder.path("../elsewhere")


def test_a_failed_atomic_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        atomic_write(tmp_path / "file", "text is not bytes")  # type: ignore[arg-type]
    assert tree(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt, SystemExit])
def test_a_file_written_in_parts_is_complete_or_unchanged_after_any_interruption(tmp_path: Path, stop: type[BaseException]) -> None:
    def interrupted_write() -> None:
        with atomically(tmp_path / "file") as file:
            file.write(b"half")
            raise stop

    atomic_write(tmp_path / "file", b"old")
    with pytest.raises(stop):
        interrupted_write()
    assert tree(tmp_path) == {"file": b"old"}
    with atomically(tmp_path / "file", mode=0o600) as file:
        for part in (b"all ", b"of ", b"it"):
            file.write(part)
            assert (tmp_path / "file").read_bytes() == b"old"
    assert tree(tmp_path) == {"file": b"all of it"}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_is_a_snapshot_despite_changes_while_it_is_written(tmp_path: Path) -> None:
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        tensors, state = {"R": torch.ones(1000)}, {"rounds": [1]}
        folder.save_checkpoint(1, tensors, state)
        tensors["R"].zero_()
        state["rounds"].append(2)
        found = folder.last_checkpoint()
    assert found is not None
    assert torch.equal(found.tensors["R"], torch.ones(1000))
    assert found.state == {"rounds": [1]}


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The fsyncs and renames, in order: ("fsync", path, size, 0 for a folder) or ("replace", new path, 0)."""
    done: list[tuple[str, str, int]] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("fsync", str(path), 0 if path.is_dir() else path.stat().st_size))

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(("replace", str(new), 0))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_an_atomic_write_syncs_the_file_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, on_disk: list[tuple[str, str, int]]
) -> None:
    atomic_write(tmp_path / "file", b"all of ", b"it")
    (written, whole, size), *rest = on_disk
    assert (written, Path(whole).match(TEMPORARY), size) == ("fsync", True, len(b"all of it"))
    assert rest == [("replace", str(tmp_path / "file"), 0), ("fsync", str(tmp_path), 0)]


def test_events_and_journal_are_synced_before_a_checkpoint_is_written(tmp_path: Path, on_disk: list[tuple[str, str, int]]) -> None:
    run = tmp_path / "run"
    with RunFolder.open(config_of(run)) as folder:
        on_disk.clear()
        folder.event("round", round=1)
        folder.record("released", round=1)
        folder.save_checkpoint(1, tensors_of(1), {})
        folder.settle()
        sizes = {name: (run / name).stat().st_size for name in ("events.jsonl", "journal.jsonl")}
    assert on_disk[:3] == [*(("fsync", str(run / name), size) for name, size in sizes.items()), ("fsync", str(run), 0)]
    assert ("replace", str(run / "checkpoints/round_0001.safetensors"), 0) in on_disk[3:]


@pytest.mark.parametrize("step", [RunFolder.settle_all, lambda folder: folder.finish({})])
def test_settle_all_and_finish_sync_events_and_journal(
    step: Callable[[RunFolder], None], tmp_path: Path, on_disk: list[tuple[str, str, int]]
) -> None:
    run = tmp_path / "run"
    with RunFolder.open(config_of(run)) as folder:
        folder.event("round", round=1)
        folder.record("asked", round=1)
        on_disk.clear()
        step(folder)
    expected = [("fsync", str(run / name), (run / name).stat().st_size) for name in ("events.jsonl", "journal.jsonl")]
    assert on_disk[:2] == expected


def test_closing_the_folder_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Store.writing

    def slow(store: Store, checkpoint: Checkpoint) -> Callable[[], None]:
        write = written(store, checkpoint)
        return lambda: (time.sleep(0.3), write())[1]

    monkeypatch.setattr(Store, "writing", slow)
    start = time.monotonic()
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        folder.save_checkpoint(1, tensors_of(1), {})
        assert time.monotonic() - start < 0.3
        assert saved(tmp_path / "run/checkpoints") == []
    assert [path.name for path in saved(tmp_path / "run/checkpoints")] == ["round_0001.safetensors"]


@pytest.mark.parametrize("step", [lambda folder: folder.save_checkpoint(2, {}, {}), RunFolder.settle, lambda folder: folder.finish({})])
def test_a_failed_checkpoint_is_raised_by_the_next_step(step: Callable[[RunFolder], None], interrupted: Path) -> None:
    with RunFolder.open(config_of(interrupted, resume=True)) as folder:
        shutil.rmtree(interrupted / "checkpoints")
        (interrupted / "checkpoints").write_text("in the way")
        folder.save_checkpoint(4, tensors_of(4), {})
        with pytest.raises(FileExistsError):
            step(folder)
    assert not (interrupted / "summary.json").exists()


def endless_run(config: Config) -> None:
    """Runs in the process to be killed: continues from the last checkpoint."""
    with RunFolder.open(config) as folder:
        found = folder.last_checkpoint()
        play_rounds(folder, count(found.round + 1 if found else 1))


def kill_after(seconds: float, config: Config) -> None:
    process = fork.Process(target=endless_run, args=(config,))
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_at_any_moment_reopens_at_its_last_checkpoint_with_each_round_once(tmp_path: Path) -> None:
    rng, config, before = random.Random(0), config_of(tmp_path / "run", resume=True), 0
    RunFolder.open(config_of(tmp_path / "run")).close()
    for _ in range(12):
        kill_after(rng.uniform(0.0, 0.15), config)
        with RunFolder.open(config) as folder:
            found = folder.last_checkpoint()
        reached = found.round if found else 0
        assert reached >= before
        assert rounds_of(tmp_path / "run") == list(range(1, reached + 1))
        assert not found or torch.equal(found.tensors["R"], tensors_of(reached)["R"])
        assert not any("tmp" in name or "damaged" in name for name in tree(tmp_path / "run"))
        before = reached
    assert before > 0


def test_a_run_killed_while_it_replaces_another_never_mixes_the_two(interrupted: Path) -> None:
    rng = random.Random(1)
    for _ in range(6):
        kill_after(rng.uniform(0.0, 0.08), config_of(interrupted, overwrite=True, seed=1))
        new = yaml.safe_load((interrupted / "config.yaml").read_text())["seed"] == 1 if (interrupted / "config.yaml").exists() else True
        with RunFolder.open(config_of(interrupted, resume=True, seed=int(new))) as folder:
            found = folder.last_checkpoint()
        assert rounds_of(interrupted) == list(range(1, found.round + 1 if found else 1))

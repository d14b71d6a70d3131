"""A full disk: one clear line, exit code 1, and a run that can be resumed once there is room."""

import errno
import json
import os
import resource

import pytest
from test_resume import SMALL, results, run_in_child

from fedsim.checkpoints import Store, load, saved
from fedsim.cli.main import main


def run_without_room_from(round_, overrides):
    """Runs the command in a forked child in which files are limited to 2,000 bytes from the checkpoint of this round on."""
    child = os.fork()
    if child == 0:
        writing = Store.writing

        def without_room(store, checkpoint):
            if checkpoint.round == round_:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            return writing(store, checkpoint)

        Store.writing = without_room
        import torch

        torch.set_num_threads(1)
        os._exit(main(["run", *overrides]))
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status)


@pytest.mark.parametrize("round_", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_full_disk_stops_the_run_with_one_line_and_the_run_can_be_resumed(round_, tmp_path, capfd):
    overrides = (*SMALL, f"run_dir={tmp_path / 'run'}")
    assert run_without_room_from(round_, overrides) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fedsim: Expected room for the files of the run in")
    assert os.strerror(errno.EFBIG) in last
    assert "resume=true" in last
    kept = saved(tmp_path / "run/checkpoints") if round_ else []
    assert [load(path).round for path in kept] == ([0, 1] if round_ else [])
    assert not run_in_child((*overrides, "resume=true"))
    assert not run_in_child((*SMALL, f"run_dir={tmp_path / 'whole'}"))
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 2
    assert main(["verify", str(tmp_path / "run")]) == 0

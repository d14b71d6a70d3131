"""Whole runs on a GPU against the same runs on the CPU (`make test-gpu`)."""

import pytest

from fedsim.api import run
from fedsim.events import read_events

BRIEF = [
    *("federation.clients=4", "federation.rounds=3", "data.train_examples=120", "data.test_examples=8", "adapter.rank=8"),
    *("training.local_steps=2", "training.batch_size=4", "training.learning_rate=0.003", "evaluation.max_new_tokens=8"),
]


def summary_and_losses(folder, device, options):
    """Returns the summary of a run on the device, with the mean training loss of every round (None where it is withheld)."""
    summary = run(*BRIEF, *options, f"model.device={device}", f"run_dir={folder / device}", quiet=True)
    return summary, [event["train_loss"] for event in read_events(folder / device / "events.jsonl") if event["kind"] == "round"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["adapter.sketch=true"],
        ["method=fedit"],
        ["method=fedex_lora"],
        ["method=flexlora"],
        ["training.activation_checkpointing=true"],
        ["privacy=example", "privacy.noise_multiplier=1"],
        ["privacy=client", "privacy.noise_multiplier=1"],
        ["privacy.secure_aggregation=true", "adapter.init=orthogonal"],
        ["model.dtype=bfloat16"],
        ["model.dtype=bfloat16", "method=fedex_lora"],
    ],
    ids=" ".join,
)
def test_a_run_on_a_gpu_matches_the_run_on_the_cpu(options, tmp_path):
    (cpu, cpu_losses), (gpu, gpu_losses) = (summary_and_losses(tmp_path, device, options) for device in ("cpu", "cuda"))
    tolerance = 0.03 if "model.dtype=bfloat16" in options else 0.01
    assert gpu_losses == (cpu_losses if None in cpu_losses else pytest.approx(cpu_losses, rel=tolerance))
    assert (gpu["communication"], gpu["privacy"]) == (cpu["communication"], cpu["privacy"])
    for task, found in cpu["evaluation"].items():
        assert gpu["evaluation"][task]["final"]["loss"] == pytest.approx(found["final"]["loss"], rel=tolerance)

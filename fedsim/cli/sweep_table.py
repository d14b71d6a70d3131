"""The table at the end of a sweep, as plain aligned text: what each job varied, its accuracies, its bytes and its time."""

from collections.abc import Callable
from math import isnan
from statistics import fmean, mean, stdev
from textwrap import shorten
from typing import Any

from fedsim.report import table

Row = dict[str, str]
WIDEST_REASON = 120
"""Most characters shown of the reason why a job failed; sweep.json and the job's own output have all of it."""
_LAST = ("loss", "epsilon", "MB up", "MB down", "MB set-up", "seconds", "status")


def sweep_table(jobs: list[dict[str, Any]]) -> str:
    """Returns one line per job {number, varied, status, error, summary}, in the given order.

    The columns include each varied option, each task ("base > final" accuracy in percent), and the mean loss over all questions, which says
    more than accuracy about free text that no answer matches word for word. A job without a summary shows its status and error.
    """
    rows = [_row(job) for job in jobs]
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    columns = [name for name in names if name not in _LAST] + [name for name in _LAST if name in names]
    text = table(columns, [[row.get(name, "") for name in columns] for row in rows])
    errors = ["", "", *(shorten(row["error"], WIDEST_REASON, placeholder=" ...") for row in rows)]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(text.splitlines(), errors, strict=True))


def seeds_table(jobs: list[dict[str, Any]]) -> str:
    """Returns a line for each combination of the other options that has finished with several seeds, "" if there is none.

    A line has the final accuracies in percent and the final loss, as mean and sample standard deviation over the seeds.
    """
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for job in jobs:
        varied = _varied(job)
        if "seed" in varied and job["summary"] is not None:
            groups.setdefault(tuple(item for item in varied.items() if item[0] != "seed"), []).append(job["summary"])
    rows = [{**dict(others), "seeds": str(len(of)), **_over_seeds(of)} for others, of in groups.items() if len(of) > 1]
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return "mean ± standard deviation over seeds\n" + table(columns, [[row.get(name, "") for name in columns] for row in rows])


def _over_seeds(summaries: list[dict[str, Any]]) -> Row:
    found: dict[str, list[float]] = {}
    for summary in summaries:
        for task, measured in summary["evaluation"].items():
            if measured["final"]["accuracy"] is not None:
                found.setdefault(task, []).append(100 * measured["final"]["accuracy"])
    accuracies = {task: f"{mean(values):.1f} ± {stdev(values):.1f}" for task, values in found.items() if len(values) == len(summaries)}
    losses = [loss for summary in summaries if (loss := _loss(summary, "final")) is not None]
    return accuracies | ({"loss": f"{mean(losses):.3f} ± {stdev(losses):.3f}"} if len(losses) == len(summaries) else {})


def _loss(summary: dict[str, Any], when: str) -> float | None:
    """Returns the mean loss over the questions of all tasks; None if a task has no loss."""
    found = [(each[when]["loss"], each["num_examples"]) for each in summary["evaluation"].values()]
    if not found or any(loss is None or isnan(loss) for loss, _ in found):
        return None
    return fmean([loss for loss, _ in found], [count for _, count in found])


def _varied(job: dict[str, Any]) -> Row:
    """Returns the options in which the job differs from the others, with their values."""
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in job["varied"])}


def _row(job: dict[str, Any]) -> Row:
    row = {"job": str(job["number"]), **_varied(job)}
    row |= {"status": job["status"], "error": job["error"] or ""}
    return row if job["summary"] is None else row | _results(job["summary"])


def _results(summary: dict[str, Any]) -> Row:
    row = {task: f"{_percent(found['base'])} > {_percent(found['final'])}" for task, found in summary["evaluation"].items()}
    row["loss"] = " > ".join(_number(_loss(summary, when), "{:.3f}".format) for when in ("base", "final"))
    communication, training = summary["communication"], summary["training"]
    if summary.get("privacy"):
        row["epsilon"] = _number(summary["privacy"]["epsilon"], "{:.2f}".format)
    return row | {
        "MB up": _megabytes(communication["uplink_bytes"]),
        "MB down": _megabytes(communication["downlink_bytes"]),
        "MB set-up": _megabytes(communication["setup_bytes"]),
        "seconds": _number(training["wall_seconds"], "{:.0f}".format),
    }


def _megabytes(num_bytes: int) -> str:
    """Returns megabytes with one decimal, below 1 with three significant digits so that they do not read as 0."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 1 else f"{megabytes:.3g}"


def _percent(measured: dict[str, Any]) -> str:
    return _number(measured["accuracy"], lambda value: f"{100 * value:.1f}")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)

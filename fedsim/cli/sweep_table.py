"""The table at the end of a sweep, as plain aligned text: what each job varied, its accuracies, its bytes and its time."""

from collections.abc import Callable
from typing import Any

from fedsim.report import table

Row = dict[str, str]
_LAST = ("epsilon", "MB up", "MB down", "MB set-up", "seconds", "status")


def sweep_table(jobs: list[dict[str, Any]]) -> str:
    """Returns one line a job in the given order: {number, varied, status, error, summary}.

    A column per varied option and per task ("base > final" accuracy in percent); a job without a summary shows its status and why.
    """
    rows = [_row(job) for job in jobs]
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    columns = [name for name in names if name not in _LAST] + [name for name in _LAST if name in names]
    text = table(columns, [[row.get(name, "") for name in columns] for row in rows])
    errors = ["", "", *(row["error"] for row in rows)]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(text.splitlines(), errors, strict=True))


def _row(job: dict[str, Any]) -> Row:
    row = {"job": str(job["number"])}
    for override in job["varied"]:
        key, _, value = override.partition("=")
        row[key.lstrip("+~")] = value
    row |= {"status": job["status"], "error": job["error"] or ""}
    return row if job["summary"] is None else row | _results(job["summary"])


def _results(summary: dict[str, Any]) -> Row:
    row = {task: f"{_percent(found['base'])} > {_percent(found['final'])}" for task, found in summary["evaluation"].items()}
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
    """Returns megabytes to a tenth, less than one with three digits that count: little is not nothing."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 1 else f"{megabytes:.3g}"


def _percent(measured: dict[str, Any]) -> str:
    return _number(measured["accuracy"], lambda value: f"{100 * value:.1f}")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)

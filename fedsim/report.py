"""What is left to read and to look at after a run: the table of results, the picture of its course, and who held what.

Tables are plain text and pictures are drawn from the events alone, so that they can be made again from a run folder.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedsim.progress import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]
Holdings = Sequence[dict[str, int]]

MOST_ROWS = 40
"""Clients that the table of holdings shows one by one."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def summary_table(summary: dict[str, Any]) -> str:
    """Returns what a run came to: accuracy and loss by task, what travelled, how long it took, and where its files are."""
    head = ["task", "questions", "accuracy base", "final", "gain", "loss base", "final"]
    rows = [_task_row(task, found) for task, found in summary["evaluation"].items()]
    moved, training = summary["communication"], summary["training"]
    lines = [
        f"{summary['method']}: {summary['clients']} clients, {summary['rounds']} rounds, seed {summary['seed']}",
        "",
        table(head, rows),
        "",
        f"sent by clients   {size(moved['uplink_bytes']):>9}   {moved['uplink_parameters']:,} parameters",
        f"sent to clients   {size(moved['downlink_bytes']):>9}   {moved['downlink_parameters']:,} parameters",
        f"for set-up        {size(moved['setup_bytes']):>9}   bases and initial gradients",
        f"training          {duration(training['wall_seconds']):>9}   {training['tokens']:,} tokens, {training['tokens_per_second']:,.0f} tokens/s",
        f"adapter           {summary['adapter_digest'][:16]}... in {summary['run_dir']}/adapter (PEFT)",
    ]
    return "\n".join(lines)


def _task_row(task: str, found: dict[str, Any]) -> list[str]:
    base, final = found["base"], found["final"]
    gain = 100 * (final["accuracy"] - base["accuracy"])
    losses = [_loss(each["loss"]) for each in (base, final)]
    return [
        task,
        str(found["num_examples"]),
        f"{100 * base['accuracy']:.1f} %",
        f"{100 * final['accuracy']:.1f} %",
        f"{gain:+.1f}",
        *losses,
    ]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def holdings_table(holdings: Holdings) -> str:
    """Returns who holds how many examples of each task, with totals; beyond MOST_ROWS clients only the first are shown."""
    tasks = list(holdings[0])
    shown = [
        [f"client {i}", *(f"{held[task]:,}" for task in tasks), f"{sum(held.values()):,}"] for i, held in enumerate(holdings[:MOST_ROWS])
    ]
    if len(holdings) > MOST_ROWS:
        shown.append([f"... {len(holdings) - MOST_ROWS} more", *[""] * (len(tasks) + 1)])
    totals = [sum(held[task] for held in holdings) for task in tasks]
    return table(["", *tasks, "all"], [*shown, ["all", *(f"{total:,}" for total in totals), f"{sum(totals):,}"]])


def transfers_csv(rows: Iterable[dict[str, int | str]]) -> bytes:
    """Returns the ledger's rows as CSV with a header."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue().encode()


# ---- pictures


def curves_png(events: Iterable[Event]) -> bytes:
    """Returns a picture of training loss, held-out accuracy and loss, and bytes by round, from the events of a run."""
    found = list(events)
    rounds = [event for event in found if event["kind"] == "round"]
    evaluated = [event for event in found if event["kind"] == "evaluated"]
    figure = _figure(11.0, 7.0)
    axes = figure.subplots(2, 2)
    _draw_training_loss(axes[0, 0], rounds)
    _draw_by_task(axes[0, 1], evaluated, "accuracy", "accuracy on held-out questions (%)", 100.0)
    _draw_by_task(axes[1, 0], evaluated, "loss", "loss on held-out answers (nats per token)", 1.0)
    _draw_bytes(axes[1, 1], [event for event in found if event["kind"] in ("initialized", "round")])
    return _png(figure)


def partition_png(holdings: Holdings) -> bytes:
    """Returns a picture of how many examples of each task every client holds."""
    figure = _figure(11.0, 4.0)
    axes = figure.subplots()
    clients = range(len(holdings))
    bottom = [0] * len(holdings)
    for task in holdings[0]:
        heights = [held[task] for held in holdings]
        axes.bar(clients, heights, bottom=bottom, label=task, width=0.85 if len(holdings) <= 60 else 1.0)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(title="who holds what", xlabel="client", ylabel="training examples", xlim=(-0.7, len(holdings) - 0.3))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_outside(axes)
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_training_loss(axes: "Axes", rounds: list[Event]) -> None:
    axes.plot(
        [event["round"] for event in rounds], [_number(event["train_loss"]) for event in rounds], marker="o", markersize=4, clip_on=False
    )
    _dress(axes, "training loss, mean over clients")


def _draw_by_task(axes: "Axes", evaluated: list[Event], name: str, title: str, scale: float) -> None:
    for task in dict.fromkeys(event["task"] for event in evaluated):
        mine = [event for event in evaluated if event["task"] == task]
        axes.plot(
            [event["round"] for event in mine], [scale * _number(event[name]) for event in mine], marker="o", markersize=4, label=task
        )
    _dress(axes, title)
    if evaluated:
        _legend_outside(axes)


def _draw_bytes(axes: "Axes", moving: list[Event]) -> None:
    """The initialisation counts as round 0."""
    for name, label, style in (("uplink_bytes", "up", "-"), ("downlink_bytes", "down", ":"), ("setup_bytes", "set-up", "-")):
        totals = list(accumulate(event.get(name, 0) / 1e6 for event in moving))
        axes.plot([event.get("round", 0) for event in moving], totals, style, marker="o", markersize=4, label=label, clip_on=False)
    _dress(axes, "sent so far, all clients (MB)")
    if moving:
        _legend_outside(axes)


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.autoscale_view()  # before the limit is set: it would keep the top where it is
    axes.set_ylim(bottom=0)


def _legend_outside(axes: "Axes") -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

"""The picture of a sweep: the results of its jobs against the bytes they moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fedsim.drawing import WITHHELD, Event, as_png, colors, draw_line, legend_outside, new_figure, or_nan, plain, say, style_round_axes
from fedsim.progress import UNITS, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TASKS = 3
"""Most tasks with a panel each; for more, one panel shows the mean."""

LABELS_IN_COLUMN, MOST_LABELS = 20, 60
"""Most labels in a column of the legend, and in the whole legend."""

MARKERS = "osD^vP*X"
"""Assigned in turn, because a dozen colours alone are hard to distinguish."""


@dataclass(frozen=True)
class Finished:
    """A finished job of a sweep: its label, events and summary. Jobs with the same label differ only in their seeds."""

    label: str
    events: Sequence[Event]
    summary: dict[str, Any]

    @property
    def moved_bytes(self) -> int:
        """Bytes of all clients in both directions, set-up included."""
        return sum(self.summary["communication"][f"{way}_bytes"] for way in ("uplink", "downlink", "setup"))

    def final(self, tasks: Sequence[str], figure: str) -> float:
        """Returns the mean final "accuracy" (0 to 1) or "loss" over the tasks; nan if one of them was not measured."""
        return mean(or_nan(self.summary["evaluation"].get(task, {}).get("final", {}).get(figure)) for task in tasks)


def comparison_png(jobs: Sequence[Finished]) -> bytes:
    """Returns the picture of `comparison` as a file."""
    return as_png(comparison, jobs)


def comparison(jobs: Sequence[Finished]) -> "Figure":
    """Draws the jobs' training loss by round, and the final accuracy of each task over the bytes moved, set-up included.

    Jobs with the same label are drawn as their mean, with their standard deviation as a band or a bar. A job that sends nothing is a line.
    With more than `MOST_TASKS` tasks, their mean is drawn. If all accuracies are zero, as for texts that no model matches exactly, the
    final loss is drawn instead. With more than `MOST_LABELS` labels there is no legend.
    """
    repeated: dict[str, list[Finished]] = {}
    for job in jobs:
        repeated.setdefault(job.label, []).append(job)
    tasks = list(dict.fromkeys(task for job in jobs for task in job.summary["evaluation"]))
    panels = {task: [task] for task in tasks} if len(tasks) <= MOST_TASKS else {f"mean of {len(tasks)} tasks": tasks}
    columns = math.ceil(len(repeated) / LABELS_IN_COLUMN) if len(repeated) <= MOST_LABELS else 0
    width_of_label = 0.5 + 0.075 * max(map(len, repeated), default=0)
    figure = new_figure(4.0 * (1 + len(panels)) + columns * width_of_label, 4.2)
    training, *others = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    styles: dict[str, dict[str, Any]] = {
        label: {"color": color, "marker": MARKERS[number % len(MARKERS)], "label": label}
        for number, (label, color) in enumerate(zip(repeated, colors(list(repeated)), strict=True))
    }
    _draw_training_losses(training, repeated, styles)
    unit = size(min((job.moved_bytes for job in jobs if job.moved_bytes), default=0)).split()[1]
    for axes, (title, shown) in zip(others, panels.items(), strict=True):
        _draw_finals(axes, repeated, styles, shown, unit)
        axes.set_title(f"{title}, {axes.get_title()}", fontsize=10)
    if columns:
        legend_outside((training, *others)[-1], columns)
    if (most := max(map(len, repeated.values()), default=1)) > 1:
        figure.suptitle(f"mean and standard deviation of {most} seeds", fontsize=9)
    return figure


def _draw_training_losses(axes: "Axes", repeated: dict[str, list[Finished]], styles: dict[str, dict[str, Any]]) -> None:
    last = 1
    for label, jobs in repeated.items():
        losses: dict[int, list[float]] = {}
        for event in (event for job in jobs for event in job.events if event["kind"] == "round"):
            losses.setdefault(event["round"], []).append(or_nan(event["train_loss"]))
        middle = [mean(values) for values in losses.values()]
        draw_line(axes, list(losses), middle, 1.2, **styles[label])
        if len(jobs) > 1:
            half = [_deviation(values) for values in losses.values()]
            low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(losses), low, high, color=styles[label]["color"], alpha=0.15, linewidth=0)
        last = max([last, *losses])
    style_round_axes(axes, "training loss (nats)", last)
    if not math.isfinite(axes.dataLim.ymin):
        say(axes, WITHHELD)
    _set_loss_scale(axes)


def _draw_finals(
    axes: "Axes", repeated: dict[str, list[Finished]], styles: dict[str, dict[str, Any]], tasks: Sequence[str], unit: str
) -> None:
    hit = any(job.final([task], "accuracy") > 0 for jobs in repeated.values() for job in jobs for task in tasks)
    figure, scale, title = ("accuracy", 100.0, "final accuracy (%)") if hit else ("loss", 1.0, "final held-out loss (nats)")
    axes.set_title(title)
    for label, jobs in repeated.items():
        finals = [scale * job.final(tasks, figure) for job in jobs]
        middle, half = mean(finals), _deviation(finals)
        moved = mean(job.moved_bytes for job in jobs) / UNITS[unit]
        color = styles[label]["color"]
        if moved:
            axes.plot([moved], [middle], linestyle="", markersize=8, alpha=0.85, clip_on=False, **styles[label])
            axes.vlines([moved] if half else [], middle - half, middle + half, color=color, linewidth=1.2)
        else:
            axes.axhline(middle, color=color, label=label, linestyle="--", linewidth=1.2)
            if half:
                axes.axhspan(middle - half, middle + half, color=color, alpha=0.1, linewidth=0)
    axes.set_xlabel(f"moved in all, set-up included ({unit})", fontsize=9)
    axes.margins(0.12)
    low, high = axes.get_ylim()
    if hit and high - low < 2:  # percentage points: do not magnify negligible differences
        axes.set_ylim(max(0.0, (low + high) / 2 - 1), (low + high) / 2 + 1)
    if any(job.moved_bytes for jobs in repeated.values() for job in jobs):
        _logarithmic(axes, "x")
    plain(axes)


def _deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation, 0 for one value; nan if a value is nan."""
    return math.nan if any(map(math.isnan, values)) else stdev(values) if len(values) > 1 else 0.0


def _set_loss_scale(axes: "Axes") -> None:
    """Separates small values by a logarithmic scale if all are above zero."""
    if 0 < axes.dataLim.minposy <= axes.dataLim.ymin < math.inf:
        _logarithmic(axes, "y")
        axes.set_ylim(0.95 * axes.dataLim.ymin, 1.05 * axes.dataLim.ymax)


def _logarithmic(axes: "Axes", which: str) -> None:
    """Gives the x or y axis a logarithmic scale with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter(f"{{x:{',' if which == 'x' else ''}g}}"))
    axis.set_minor_formatter(NullFormatter())

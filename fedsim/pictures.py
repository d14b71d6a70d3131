"""What is left to look at after a run or a sweep: pictures of events and summaries alone, so that a folder can be drawn again."""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from fedsim.progress import UNITS, size
from fedsim.report import Holdings, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]
Shown = TypeVar("Shown")

MOST_NAMED = 30
"""Clients that the picture of holdings numbers one by one, and rounds that the curves mark one by one."""

MOST_BARS = 60
"""Clients that have a bar each in the picture of holdings."""

MOST_TASKS = 3
"""Tasks that have a panel each in the comparison of a sweep; of more the mean is shown."""

LABELS_IN_COLUMN, MOST_LABELS = 20, 60
"""Jobs of a sweep that the legend of its comparison names in a column, and in all."""

MARKERS = "osD^vP*X"
"""Of the jobs of a sweep, in turn: colours alone do not tell a dozen apart."""


@dataclass(frozen=True)
class Finished:
    """A finished job of a sweep: what it is called, its events and its summary."""

    label: str
    events: Sequence[Event]
    summary: dict[str, Any]


def curves_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `curves` as a file."""
    return _png(curves, events)


def partition_png(holdings: Holdings) -> bytes:
    """Returns the picture of `holdings_bars` as a file."""
    return _png(holdings_bars, holdings)


def curves(events: Iterable[Event]) -> "Figure":
    """Draws held-out accuracy and loss, training loss, and bytes by round, from the events of a run, whether it has ended or not."""
    found = list(events)
    rounds = [event for event in found if event["kind"] == "round"]
    evaluated = [event for event in found if event["kind"] == "evaluated"]
    figure = _figure(11.0, 7.0)
    (accuracy, loss), (training, moved) = figure.subplots(2, 2)
    _draw_by_task(accuracy, evaluated, "accuracy", 100.0)
    _draw_by_task(loss, evaluated, "loss", 1.0)
    _draw_training_loss(training, rounds)
    unit = _draw_bytes(moved, [event for event in found if event["kind"] in ("initialized", "round", "refreshed")])
    titles = [
        "held-out accuracy (%)",
        "held-out loss (nats per token)",
        "training loss (nats per token)",
        f"sent so far, all clients ({unit})",
    ]
    last = max([event["round"] for event in rounds], default=1)
    for axes, title in zip((accuracy, loss, training, moved), titles, strict=True):
        _dress(axes, title, last)
    accuracy.set_ylim(0, 100)
    for axes in (loss, moved):  # on the right: beside the data, never over it
        _legend_outside(axes)
    return figure


def diagnosis_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `diagnosis` as a file."""
    return _png(diagnosis, events)


def diagnosis(events: Iterable[Event]) -> "Figure":
    """Draws by round how far the average misses the mean of the clients' updates (a line per layer), the clients' drift, and the rank."""
    rounds = [event for event in events if event["kind"] == "round"]
    figure = _figure(11.0, 3.6)
    missed, drift, rank = figure.subplots(1, 3)
    measured = [event for event in rounds if event.get("deviation")]
    for layer in measured[0]["deviation"] if measured else ():
        values = [100 * _number(event["deviation"][layer]) for event in measured]
        _draw(missed, [event["round"] for event in measured], values, linewidth=0.8, color="tab:blue", alpha=0.5)
    for axes, name in ((drift, "drift"), (rank, "effective_rank")):
        _draw(axes, [event["round"] for event in rounds], [_number(event.get(name)) for event in rounds], color="black")
    last = max([event["round"] for event in rounds], default=1)
    exact = any(event.get("deviation") == {} for event in rounds)
    for axes, title in (
        (missed, "missed by the average, each layer (%)"),
        (drift, "client drift (spread of updates / mean update)"),
        (rank, "effective rank of the update, mean of layers"),
    ):
        _dress(axes, title, last)
    if not measured:
        _say(missed, "nothing: the average is exact" if exact else "not measured")
        missed.set_yticks([])
    return figure


def network_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `network_curves` as a file."""
    return _png(network_curves, events)


def network_curves(events: Iterable[Event]) -> "Figure":
    """Draws training loss and held-out accuracy over simulated time."""
    from matplotlib.ticker import AutoLocator

    found = list(events)
    times = {event["round"]: event["simulated_time"] for event in found if event["kind"] == "round" and "simulated_time" in event}
    rounds = [event for event in found if event["kind"] == "round" and event["round"] in times]
    evaluated = [event | {"round": times.get(event["round"], 0.0)} for event in found if event["kind"] == "evaluated"]
    figure = _figure(11.0, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, [times[event["round"]] for event in rounds], [_number(event["train_loss"]) for event in rounds], color="black")
    _draw_by_task(accuracy, evaluated, "accuracy", 100.0, over_time=True)
    last = max(times.values(), default=1.0)
    for axes, title in ((loss, "training loss (nats per token)"), (accuracy, "held-out accuracy (%)")):
        _dress(axes, title, last)
        axes.set_xlabel("simulated seconds", fontsize=9)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(AutoLocator())
    accuracy.set_ylim(0, 100)
    _legend_outside(accuracy)
    return figure


def privacy_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `privacy_curve` as a file."""
    return _png(privacy_curve, events)


def privacy_curve(events: Iterable[Event]) -> "Figure":
    """Draws the largest epsilon of a client by round, and the budget where there is one."""
    found = list(events)
    rounds = [event for event in found if event["kind"] == "round" and event.get("epsilon") is not None]
    budget = next((event["budget"] for event in found if event["kind"] == "privacy_planned"), None)
    figure = _figure(6.0, 3.6)
    axes = figure.subplots()
    _draw(axes, [event["round"] for event in rounds], [event["epsilon"] for event in rounds], color="black", label="spent")
    last = max([event["round"] for event in rounds], default=1)
    _dress(axes, "largest epsilon of a client", last)
    if budget is not None:
        axes.axhline(budget, color="tab:red", linewidth=1.0, label="budget")
        axes.set_ylim(0, 1.15 * max([budget, *(event["epsilon"] for event in rounds)]))
    _legend_outside(axes)
    return figure


def comparison_png(jobs: Sequence[Finished]) -> bytes:
    """Returns the picture of `comparison` as a file."""
    return _png(comparison, jobs)


def comparison(jobs: Sequence[Finished]) -> "Figure":
    """Draws the jobs' training loss by round, and beside it the final accuracy of each task over all bytes, the set-up included.

    A job that sends nothing is a line across; of more tasks than `MOST_TASKS` the mean accuracy is shown. Of more jobs than `MOST_LABELS`
    none is named.
    """
    tasks = list(dict.fromkeys(task for job in jobs for task in job.summary["evaluation"]))
    panels = {task: [task] for task in tasks} if len(tasks) <= MOST_TASKS else {f"mean of {len(tasks)} tasks": tasks}
    columns = math.ceil(len(jobs) / LABELS_IN_COLUMN) if len(jobs) <= MOST_LABELS else 0
    width_of_label = 0.5 + 0.075 * max((len(job.label) for job in jobs), default=0)
    figure = _figure(4.0 * (1 + len(panels)) + columns * width_of_label, 4.2)
    training, *others = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    styles: list[dict[str, Any]] = [
        {"color": color, "marker": MARKERS[number % len(MARKERS)], "label": job.label}
        for number, (job, color) in enumerate(zip(jobs, _colors([job.label for job in jobs]), strict=True))
    ]
    last = 1
    for job, style in zip(jobs, styles, strict=True):
        rounds = [event for event in job.events if event["kind"] == "round"]
        _draw(training, [event["round"] for event in rounds], [_number(event["train_loss"]) for event in rounds], 1.2, **style)
        last = max([last, *(event["round"] for event in rounds)])
    _dress(training, "training loss (nats per token)", last)
    _spread(training)
    for axes, (title, shown) in zip(others, panels.items(), strict=True):
        _draw_accuracies(axes, jobs, styles, shown)
        axes.set_title(f"{title}, final accuracy (%)", fontsize=10)
    if columns:
        _legend_outside((training, *others)[-1], columns)
    return figure


def _draw_accuracies(axes: "Axes", jobs: Sequence[Finished], styles: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    moved = [sum(job.summary["communication"][f"{way}_bytes"] for way in ("uplink", "downlink", "setup")) for job in jobs]
    unit = size(min(filter(None, moved), default=0)).split()[1]
    for job, style, num_bytes in zip(jobs, styles, moved, strict=True):
        found = [job.summary["evaluation"].get(task) for task in tasks]
        values = [100 * _number(each["final"]["accuracy"]) if each else math.nan for each in found]
        accuracy = sum(values) / len(values)
        if num_bytes:
            axes.plot([num_bytes / UNITS[unit]], [accuracy], linestyle="", markersize=8, alpha=0.85, clip_on=False, **style)
        else:
            axes.axhline(accuracy, color=style["color"], label=job.label, linestyle="--", linewidth=1.2)
    axes.set_xlabel(f"moved in all, set-up included ({unit})", fontsize=9)
    axes.margins(0.12)
    low, high = axes.get_ylim()
    if high - low < 2:  # of a hundred: no wide gap where there is no difference
        axes.set_ylim(max(0.0, (low + high) / 2 - 1), (low + high) / 2 + 1)
    if any(moved):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _plain(axes)


def holdings_bars(holdings: Holdings) -> "Figure":
    """Draws how many examples of each task every client holds, stacked."""
    figure = _figure(11.0, 4.0)
    axes = figure.subplots()
    tasks, clients = list(holdings[0]), range(len(holdings))
    bottom = [0] * len(holdings)
    for task, color in zip(tasks, _colors(tasks), strict=True):
        heights = [held[task] for held in holdings]
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        if len(holdings) <= MOST_BARS:
            axes.bar(clients, heights, bottom=bottom, label=task, color=color, width=0.85)
        else:  # one outline: ten thousand bars take half a minute
            axes.stairs(top, [client - 0.5 for client in range(len(top) + 1)], baseline=bottom, fill=True, label=task, color=color)
        bottom = top
    title = f"who holds what: {counted(len(holdings), 'client')}, {counted(sum(bottom), 'training example')}"
    middle, half = (len(holdings) - 1) / 2, max(len(holdings), 2) / 2 + 0.2  # a single bar does not fill the picture
    axes.set(title=title, xlabel="client", ylabel="training examples", xlim=(middle - half, middle + half))
    if len(holdings) <= MOST_NAMED:
        axes.set_xticks(clients)
    _legend_outside(axes)
    return figure


def _figure(width: float, height: float) -> "Figure":
    """A figure outside pyplot: nothing global is touched, and no display is needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(draw: "Callable[[Shown], Figure]", shown: Shown) -> bytes:
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a task may be named $5
        draw(shown).savefig(content, format="png")
    return content.getvalue()


def _colors(names: Sequence[str]) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(len(names))]


def _draw_by_task(axes: "Axes", evaluated: list[Event], name: str, scale: float, *, over_time: bool = False) -> None:
    """A line is broken where rounds lie between two points that nobody has evaluated."""
    tasks = list(dict.fromkeys(event["task"] for event in evaluated))
    for task, color in zip(tasks, _colors(tasks), strict=True):
        mine = [event for event in evaluated if event["task"] == task]
        values = [scale * _number(event[name]) for event in mine]
        label = task if any(map(math.isfinite, values)) else f"{task} (no {name})"
        rounds = [event["round"] for event in mine]
        between = "--" if not over_time and any(later - earlier > 1 for earlier, later in pairwise(rounds)) else "-"
        _draw(axes, rounds, values, color=color, label=label, linestyle=between)


def _draw_training_loss(axes: "Axes", rounds: list[Event]) -> None:
    """The mean over clients, by their examples."""
    losses = [_number(event["train_loss"]) for event in rounds]
    _draw(axes, [event["round"] for event in rounds], losses, color="black")
    if losses and all(map(math.isnan, losses)):
        _say(axes, "withheld: private clients tell none")


def _say(axes: "Axes", text: str) -> None:
    """Says in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, transform=axes.transAxes)


def _draw_bytes(axes: "Axes", moving: list[Event]) -> str:
    """Draws running totals, the initialisation as round 0, and returns their unit. Up is broad: down may lie on it and both are seen."""
    kinds = {"up": ("uplink_bytes", 4.0), "down": ("downlink_bytes", 1.5), "set-up": ("setup_bytes", 1.5)}
    totals = {label: list(accumulate(event.get(name, 0) for event in moving)) for label, (name, _) in kinds.items()}
    most = max((values[-1] for values in totals.values() if values), default=0)
    unit = size(most).split()[1]
    for (label, values), color in zip(totals.items(), _colors(list(kinds)), strict=True):
        rounds = [event.get("round", 0) for event in moving]
        _draw(axes, rounds, [value / UNITS[unit] for value in values], color=color, label=label, linewidth=kinds[label][1])
    return unit


def _draw(axes: "Axes", rounds: Sequence[float], values: list[float], linewidth: float = 1.5, **style: Any) -> None:
    marker_size = linewidth + (2.5 if len(rounds) <= MOST_NAMED else 0.5)
    own: dict[str, Any] = {"marker": "o", "markersize": marker_size, "linewidth": linewidth, "clip_on": False}
    if rounds:  # a line without points that is not clipped has no bounds, and the layout fails
        axes.plot(rounds, values, **own | style)


def _dress(axes: "Axes", title: str, last_round: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round", fontsize=9)
    axes.set_xlim(0, max(1, last_round) if last_round != 1 else 1.5)  # the only round does not lie on the edge
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _plain(axes)
    highest = axes.dataLim.ymax  # -inf without data
    axes.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1.0)


def _spread(axes: "Axes") -> None:
    """Shows small values of many lines apart, where all are above zero."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if 0 < axes.dataLim.minposy <= axes.dataLim.ymin < math.inf:
        axes.set_yscale("log")
        axes.set_ylim(0.95 * axes.dataLim.ymin, 1.05 * axes.dataLim.ymax)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend_outside(axes: "Axes", columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8, ncols=columns)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

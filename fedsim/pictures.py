"""Pictures of a run, drawn from its events alone, so that they can be redrawn from its folder."""

import math
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from fedsim.drawing import MOST_NAMED, WITHHELD, Event, as_png, colors, draw_line, legend_outside, new_figure, or_nan, say, style_round_axes
from fedsim.progress import UNITS, plural, size
from fedsim.report import Holdings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 60
"""Most clients with a bar each in the picture of holdings."""


def curves_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `curves` as a file."""
    return as_png(curves, events)


def partition_png(holdings: Holdings) -> bytes:
    """Returns the picture of `holdings_bars` as a file."""
    return as_png(holdings_bars, holdings)


def curves(events: Iterable[Event]) -> "Figure":
    """Draws held-out accuracy and loss, training loss, and bytes by round from the events of a run, finished or not."""
    found = list(events)
    rounds = [event for event in found if event["kind"] == "round"]
    evaluated = [event for event in found if event["kind"] == "evaluated"]
    figure = new_figure(11.0, 7.0)
    (accuracy, loss), (training, moved) = figure.subplots(2, 2)
    _draw_by_task(accuracy, evaluated, "accuracy", 100.0)
    _draw_by_task(loss, evaluated, "loss", 1.0)
    _draw_training_loss(training, rounds, [event["round"] for event in rounds])
    unit = _draw_bytes(moved, [event for event in found if event["kind"] in ("initialized", "round", "refreshed")])
    titles = [
        "held-out accuracy (%)",
        "held-out loss (nats)",
        "training loss (nats)",
        f"sent so far, all clients ({unit})",
    ]
    last = max([event["round"] for event in rounds], default=1)
    for axes, title in zip((accuracy, loss, training, moved), titles, strict=True):
        style_round_axes(axes, title, last)
    accuracy.set_ylim(0, 100)
    for axes in (loss, moved):  # the panels on the right
        legend_outside(axes)
    return figure


def diagnosis_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `diagnosis` as a file."""
    return as_png(diagnosis, events)


def diagnosis(events: Iterable[Event]) -> "Figure":
    """Draws by round how far the average misses the mean of the clients' updates (a line per layer), client drift, and effective rank."""
    rounds = [event for event in events if event["kind"] == "round"]
    figure = new_figure(11.0, 3.6)
    missed, drift, rank = figure.subplots(1, 3)
    measured = [event for event in rounds if event.get("deviation")]
    for layer in measured[0]["deviation"] if measured else ():
        values = [100 * or_nan(event["deviation"][layer]) for event in measured]
        draw_line(missed, [event["round"] for event in measured], values, linewidth=0.8, color="tab:blue", alpha=0.5)
    for axes, name in ((drift, "drift"), (rank, "effective_rank")):
        draw_line(axes, [event["round"] for event in rounds], [or_nan(event.get(name)) for event in rounds], color="black")
    last = max([event["round"] for event in rounds], default=1)
    exact = any(event.get("deviation") == {} for event in rounds)
    for axes, title in (
        (missed, "missed by the average, each layer (%)"),
        (drift, "client drift (spread of updates / mean update)"),
        (rank, "effective rank of the update, mean of layers"),
    ):
        style_round_axes(axes, title, last)
    if not measured:
        say(missed, "nothing: the average is exact" if exact else "not measured")
        missed.set_yticks([])
    return figure


def network_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `network_curves` as a file."""
    return as_png(network_curves, events)


def network_curves(events: Iterable[Event]) -> "Figure":
    """Draws training loss and held-out accuracy over simulated time."""
    from matplotlib.ticker import AutoLocator

    found = list(events)
    times = {event["round"]: event["simulated_time"] for event in found if event["kind"] == "round" and "simulated_time" in event}
    rounds = [event for event in found if event["kind"] == "round" and event["round"] in times]
    evaluated = [event | {"round": times.get(event["round"], 0.0)} for event in found if event["kind"] == "evaluated"]
    figure = new_figure(11.0, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    _draw_training_loss(loss, rounds, [times[event["round"]] for event in rounds])
    _draw_by_task(accuracy, evaluated, "accuracy", 100.0, over_time=True)
    last = max(times.values(), default=1.0)
    for axes, title in ((loss, "training loss (nats)"), (accuracy, "held-out accuracy (%)")):
        style_round_axes(axes, title, last)
        axes.set_xlabel("simulated seconds", fontsize=9)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(AutoLocator())
    accuracy.set_ylim(0, 100)
    legend_outside(accuracy)
    return figure


def privacy_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `privacy_curve` as a file."""
    return as_png(privacy_curve, events)


def privacy_curve(events: Iterable[Event]) -> "Figure":
    """Draws the largest epsilon of a client by round, and the budget if there is one."""
    found = list(events)
    rounds = [event for event in found if event["kind"] == "round" and event.get("epsilon") is not None]
    budget = next((event["budget"] for event in found if event["kind"] == "privacy_planned"), None)
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    draw_line(axes, [event["round"] for event in rounds], [event["epsilon"] for event in rounds], color="black", label="spent")
    last = max([event["round"] for event in rounds], default=1)
    style_round_axes(axes, "largest epsilon of a client", last)
    if budget is not None:
        axes.axhline(budget, color="tab:red", linewidth=1.0, label="budget")
        axes.set_ylim(0, 1.15 * max([budget, *(event["epsilon"] for event in rounds)]))
    legend_outside(axes)
    return figure


def holdings_bars(holdings: Holdings) -> "Figure":
    """Draws the number of examples of each task that every client holds, stacked."""
    figure = new_figure(11.0, 4.0)
    axes = figure.subplots()
    tasks, clients = list(holdings[0]), range(len(holdings))
    bottom = [0] * len(holdings)
    for task, color in zip(tasks, colors(tasks), strict=True):
        heights = [held[task] for held in holdings]
        top = [low + height for low, height in zip(bottom, heights, strict=True)]
        if len(holdings) <= MOST_BARS:
            axes.bar(clients, heights, bottom=bottom, label=task, color=color, width=0.85)
        else:  # one outline: ten thousand bars take half a minute
            axes.stairs(top, [client - 0.5 for client in range(len(top) + 1)], baseline=bottom, fill=True, label=task, color=color)
        bottom = top
    title = f"training data by client: {plural(len(holdings), 'client')}, {plural(sum(bottom), 'training example')}"
    middle, half = (len(holdings) - 1) / 2, max(len(holdings), 2) / 2 + 0.2  # keeps a single bar from filling the picture
    axes.set(title=title, xlabel="client", ylabel="training examples", xlim=(middle - half, middle + half))
    if len(holdings) <= MOST_NAMED:
        axes.set_xticks(clients)
    legend_outside(axes)
    return figure


def _draw_by_task(axes: "Axes", evaluated: list[Event], name: str, scale: float, *, over_time: bool = False) -> None:
    """Draws one line per task, dashed if rounds without an evaluation lie between its points."""
    tasks = list(dict.fromkeys(event["task"] for event in evaluated))
    for task, color in zip(tasks, colors(tasks), strict=True):
        mine = [event for event in evaluated if event["task"] == task]
        values = [scale * or_nan(event[name]) for event in mine]
        label = task if any(map(math.isfinite, values)) else f"{task} (no {name})"
        rounds = [event["round"] for event in mine]
        between = "--" if not over_time and any(later - earlier > 1 for earlier, later in pairwise(rounds)) else "-"
        draw_line(axes, rounds, values, color=color, label=label, linestyle=between)


def _draw_training_loss(axes: "Axes", rounds: list[Event], places: list[float]) -> None:
    """Draws the mean loss over clients, weighted by their examples; `places` are the rounds' x coordinates."""
    losses = [or_nan(event["train_loss"]) for event in rounds]
    draw_line(axes, places, losses, color="black")
    if losses and all(map(math.isnan, losses)):
        say(axes, WITHHELD)


def _draw_bytes(axes: "Axes", moving: list[Event]) -> str:
    """Draws running totals, the initialisation as round 0, and returns their unit. Uplink is broad, so that downlink shows on it."""
    kinds = {"up": ("uplink_bytes", 4.0), "down": ("downlink_bytes", 1.5), "set-up": ("setup_bytes", 1.5)}
    totals = {label: list(accumulate(event.get(name, 0) for event in moving)) for label, (name, _) in kinds.items()}
    most = max((values[-1] for values in totals.values() if values), default=0)
    unit = size(most).split()[1]
    for (label, values), color in zip(totals.items(), colors(list(kinds)), strict=True):
        rounds = [event.get("round", 0) for event in moving]
        draw_line(axes, rounds, [value / UNITS[unit] for value in values], color=color, label=label, linewidth=kinds[label][1])
    return unit

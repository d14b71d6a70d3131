"""What is left to read and to look at after a run: the table of results, the pictures of its course, and who held what.

Tables are plain text and pictures are drawn from the events alone, so that they can be made again from a run folder.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedsim.progress import UNITS, duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]
Holdings = Sequence[dict[str, int]]

MOST_NAMED = 30
"""Clients that the picture of holdings numbers one by one, and rounds that the curves mark one by one."""

MOST_BARS = 60
"""Clients that have a bar each in the picture of holdings."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def summary_table(summary: dict[str, Any]) -> str:
    """Returns what a run came to: accuracy and loss by task, what travelled, how long it took, where its files are, and what to do next."""
    head = ["task", "questions", "accuracy base", "final", "points gained", "loss base", "final"]
    rows = [_task_row(task, found) for task, found in summary["evaluation"].items()]
    moved, training, folder = summary["communication"], summary["training"], summary["run_dir"]
    speed = f"{training['tokens']:,} tokens, {training['tokens_per_second']:,.0f} tokens/s" if training["tokens"] else "tokens withheld"
    run = f"{counted(summary['clients'], 'client')}, {counted(summary['rounds'], 'round')}, rank {summary['rank']}"
    lines = [
        f"{summary['method']}: {run}, seed {summary['seed']}",
        "",
        table(head, rows),
        *_cut_off_lines(summary["evaluation"]),
        "",
        f"sent by clients   {size(moved['uplink_bytes']):>9}   {moved['uplink_parameters']:,} parameters",
        f"sent to clients   {size(moved['downlink_bytes']):>9}   {moved['downlink_parameters']:,} parameters",
        f"for set-up        {size(moved['setup_bytes']):>9}   bases and initial gradients (1 MB = 10^6 bytes)",
        f"training          {duration(training['wall_seconds']):>9}   {speed}",
        *_missing_lines(summary["missing"]),
        *_network_lines(summary.get("network")),
        *_privacy_lines(summary["privacy"]),
        "",
        f"files     {folder}: summary.json, curves.png, diagnosis.png, partition.png, holdings.txt, communication.csv, events.jsonl",
        f"adapter   {folder}/adapter, digest {summary['adapter_digest'][:16]}...",
        f'next      PEFT loads it: PeftModel.from_pretrained(base_model, "{folder}/adapter")',
    ]
    return "\n".join(lines)


def _cut_off_lines(evaluation: dict[str, Any]) -> list[str]:
    counts = {
        name: sum(found[name].get("num_cut_off", 0) for found in evaluation.values())  # a run of an earlier version did not count
        for name in ("base", "final")
    }
    if not any(counts.values()):
        return []
    told = f"{counts['base']:,} of the base model, {counts['final']:,} of the final one"
    return [f"cut off: {told}: answers without an end, right only where they had named their result (evaluation.max_new_tokens)"]


def _missing_lines(counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    return [f"missing           {sum(counts.values()):>9,}   replies that were asked for and are in no round: {reasons}"]


def _network_lines(network: dict[str, Any] | None) -> list[str]:
    if network is None:
        return []
    seconds = network["simulated_seconds"]
    shown = duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"
    return [f"simulated         {shown:>9}   set-up and rounds on the network {network['name']}, {network['mode']}"]


def _privacy_lines(spent: dict[str, Any] | None) -> list[str]:
    """An epsilon without bound is infinite in a run's memory and null in its files."""
    if spent is None:
        return []
    if spent["epsilon"] is None or math.isinf(spent["epsilon"]):
        return [f"privacy           {'none':>9}   something was computed from private data without noise: no epsilon is claimed"]
    first = f", of it initialisation {spent['initialization_epsilon']:.2f}" if spent["initialization_epsilon"] else ""
    told = f"epsilon of one {spent['unit']}, largest over clients{first}; delta {spent['delta']:.2g}, {spent['accountant']}"
    return [f"privacy           {spent['epsilon']:>9.2f}   {told}"]


def _task_row(task: str, found: dict[str, Any]) -> list[str]:
    base, final = found["base"], found["final"]
    accuracies = [f"{100 * each['accuracy']:.1f} %" for each in (base, final)]
    losses = [_loss(each["loss"]) for each in (base, final)]
    return [task, f"{found['num_examples']:,}", *accuracies, f"{100 * (final['accuracy'] - base['accuracy']):+.1f}", *losses]


def counted(number: int, noun: str) -> str:
    """Returns "1 round" or "1,000 rounds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _loss(value: float | None) -> str:
    """A loss that is no number is NaN in a run's memory and null in its files."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def holdings_table(holdings: Holdings, max_clients: int | None = 40) -> str:
    """Returns who holds how many examples of each task, with totals; of more than `max_clients` clients only the first are shown."""
    tasks = list(holdings[0])
    rows = [[f"client {i}", *_with_total([held[task] for task in tasks])] for i, held in enumerate(holdings[:max_clients])]
    if len(rows) < len(holdings):
        rows.append([f"... {len(holdings) - len(rows):,} more", *[""] * (len(tasks) + 1)])
    totals = [sum(held[task] for held in holdings) for task in tasks]
    return table(["", *tasks, "all"], [*rows, ["all", *_with_total(totals)]])


def _with_total(counts: list[int]) -> list[str]:
    return [f"{count:,}" for count in [*counts, sum(counts)]]


def transfers_csv(rows: Iterable[dict[str, int | str]]) -> bytes:
    """Returns the ledger's rows as CSV with a header."""
    from fedsim.core.communication import COLUMNS

    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# ---- pictures


def curves_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `curves` as a file."""
    return _png(curves(events))


def partition_png(holdings: Holdings) -> bytes:
    """Returns the picture of `holdings_bars` as a file."""
    return _png(holdings_bars(holdings))


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
    return _png(diagnosis(events))


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
    exact = "missed by the average (%)" if measured else "missed by the average: nothing, it is exact"
    for axes, title in (
        (missed, exact),
        (drift, "drift of clients over mean step"),
        (rank, "effective rank of the update, mean of layers"),
    ):
        _dress(axes, title, last)
    return figure


def network_png(events: Iterable[Event]) -> bytes:
    """Returns the picture of `network_curves` as a file."""
    return _png(network_curves(events))


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
    _draw_by_task(accuracy, evaluated, "accuracy", 100.0)
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
    return _png(privacy_curve(events))


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


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _colors(names: Sequence[str]) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(len(names))]


def _draw_by_task(axes: "Axes", evaluated: list[Event], name: str, scale: float) -> None:
    tasks = list(dict.fromkeys(event["task"] for event in evaluated))
    for task, color in zip(tasks, _colors(tasks), strict=True):
        mine = [event for event in evaluated if event["task"] == task]
        values = [scale * _number(event[name]) for event in mine]
        label = task if any(map(math.isfinite, values)) else f"{task} (no {name})"
        _draw(axes, [event["round"] for event in mine], values, color=color, label=label)


def _draw_training_loss(axes: "Axes", rounds: list[Event]) -> None:
    """The mean over clients, by their examples."""
    _draw(axes, [event["round"] for event in rounds], [_number(event["train_loss"]) for event in rounds], color="black")


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
    marker = linewidth + (2.5 if len(rounds) <= MOST_NAMED else 0.5)
    if rounds:  # a line without points that is not clipped has no bounds, and the layout fails
        axes.plot(rounds, values, marker="o", markersize=marker, linewidth=linewidth, clip_on=False, **style)


def _dress(axes: "Axes", title: str, last_round: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round", fontsize=9)
    axes.set_xlim(0, max(1, last_round) if last_round != 1 else 1.5)  # the only round does not lie on the edge
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    highest = axes.dataLim.ymax  # -inf without data
    axes.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend_outside(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

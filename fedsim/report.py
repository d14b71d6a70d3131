"""Text reports of a run: the table of results, the clients' holdings, and every transfer. Pictures are in `fedsim.pictures`."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedsim.core.missing import reasons_text
from fedsim.progress import duration, plural, size

Holdings = Sequence[dict[str, int]]

PICTURES = ("curves.png", "diagnosis.png", "partition.png", "privacy.png", "network.png")
FILES = ("summary.json", *PICTURES, "holdings.txt", "communication.csv", "events.jsonl")
"""Files of a run folder for readers, in the order in which the summary lists them."""

LOOSE_DELTA = 0.05
"""A larger delta is reported as hardly a guarantee: the mechanism may fully reveal one record in twenty."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an aligned text table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def summary_table(summary: dict[str, Any]) -> str:
    """Returns a run's results as text: accuracy and loss by task, traffic, duration, the location of its files, and what to do next."""
    head = ["task", "questions", "accuracy base", "final", "points gained", "loss base", "final"]
    rows = [_task_row(task, found) for task, found in summary["evaluation"].items()]
    moved, training, folder = summary["communication"], summary["training"], summary["run_dir"]
    speed = f"{training['tokens']:,} tokens, {training['tokens_per_second']:,.0f} tokens/s" if training["tokens"] else "tokens withheld"
    rank = "" if summary["rank"] is None else f", rank {summary['rank']}"
    run = f"{plural(summary['clients'], 'client')}, {plural(summary['rounds'], 'round')}{rank}"
    adapter = summary.get("adapter", "adapter")  # of personal methods the first client's, None if adapters stay at the workers
    loaded = [f'next      PEFT loads it: PeftModel.from_pretrained(base_model, "{folder}/{adapter}")'] if adapter else []
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
        f"files     {folder}: {', '.join(name for name in FILES if (Path(folder) / name).exists())}",
        f"adapter   {folder}/adapter, digest {summary['adapter_digest'][:16]}..."
        if adapter
        else "adapter   with each client, at its own worker",
        *loaded,
    ]
    return "\n".join(lines)


def _cut_off_lines(evaluation: dict[str, Any]) -> list[str]:
    base, final = (_num_cut_off(evaluation, name) for name in ("base", "final"))
    if not base and not final:
        return []
    of_final = "those of the final one are not counted" if final is None else f"{final:,} of the final one"
    text = f"{base or 0:,} of the base model, {of_final}"
    return [f"cut off: {text}: unfinished, right only if they had stated their result (evaluation.max_new_tokens)"]


def _num_cut_off(evaluation: dict[str, Any], name: str) -> int | None:
    """Returns a count over all tasks; None without one, as for personal methods and runs of earlier versions."""
    counts = [found[name]["num_cut_off"] for found in evaluation.values() if "num_cut_off" in found[name]]
    return sum(counts) if counts else None


def _missing_lines(counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    return [f"missing           {sum(counts.values()):>9,}   requested replies that no round includes: {reasons_text(counts)}"]


def _network_lines(network: dict[str, Any] | None) -> list[str]:
    if network is None:
        return []
    seconds = network["simulated_seconds"]
    shown = duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"
    return [f"simulated         {shown:>9}   set-up and rounds on the network {network['name']}, {network['mode']}"]


def _privacy_lines(spent: dict[str, Any] | None) -> list[str]:
    """An unbounded epsilon is infinite in memory and null in files."""
    if spent is None:
        return []
    if spent["epsilon"] is None or math.isinf(spent["epsilon"]):
        return [f"privacy           {'none':>9}   something was computed from private data without noise: no epsilon is claimed"]
    first = f", of it initialisation {spent['initialization_epsilon']:.2f}" if spent["initialization_epsilon"] else ""
    text = f"epsilon of one {spent['unit']}, largest over clients{first}; delta {spent['delta']:.2g}, {spent['accountant']}"
    lines = [f"privacy           {spent['epsilon']:>9.2f}   {text}"]
    return [*lines, *(f"{'':30}{line}" for line in loose_delta_lines(spent["delta"]))]


def loose_delta_lines(delta: float) -> list[str]:
    """Returns a warning line for a delta above LOOSE_DELTA, else no line."""
    text = f"delta {delta:.2g} is hardly a guarantee: it should be far below 1 over their number"
    return [text] if delta > LOOSE_DELTA else []


def _task_row(task: str, found: dict[str, Any]) -> list[str]:
    base, final = found["base"], found["final"]
    accuracies = [f"{100 * each['accuracy']:.1f} %" for each in (base, final)]
    losses = [_loss(each["loss"]) for each in (base, final)]
    return [task, f"{found['num_examples']:,}", *accuracies, f"{100 * (final['accuracy'] - base['accuracy']):+.1f}", *losses]


def _loss(value: float | None) -> str:
    """Formats a loss; one that is not a number, NaN in memory and null in files, becomes "-"."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def holdings_table(holdings: Holdings, max_clients: int | None = 40, owners: Sequence[Sequence[str]] = ()) -> str:
    """Returns a table of each client's number of examples by task, with totals; shows at most the first `max_clients` clients.

    `owners` are, if the data names any, the owners whose examples each client holds.
    """
    tasks = list(holdings[0])
    rows = [[f"client {i}", *_with_total([held[task] for task in tasks])] for i, held in enumerate(holdings[:max_clients])]
    if len(rows) < len(holdings):
        rows.append([f"... {len(holdings) - len(rows):,} more", *[""] * (len(tasks) + 1)])
    rows.append(["all", *_with_total([sum(held[task] for held in holdings) for task in tasks])])
    head = ["", *tasks, "all"]
    if owners:
        head.append("owners")
        for row, names in zip(rows, owners[:max_clients], strict=False):
            row.append(_abbreviated(names))
        rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return table(head, rows)


def _abbreviated(names: Sequence[str]) -> str:
    """Returns the first three names, with unprintable characters replaced, and the number of further ones."""
    shown = ["".join(letter if letter.isprintable() else "?" for letter in name[:24]) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


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

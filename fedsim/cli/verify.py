"""`fedsim verify`: checks that a run's audit log is unchanged and that the run's results agree with it.

The log's last line holds the whole summary, so the hash chain fixes every figure in it. The other files must agree: each transfer with the
ledger in the last checkpoint, the sums of the transfers and the figures in events.jsonl with the summary, and the adapter's files with
their hashes in the summary.
"""

import csv
import json
from collections.abc import Container, Iterable, Iterator
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedsim.checkpoints import Checkpoint, DamagedError, load, saved
from fedsim.core.communication import CommunicationLedger
from fedsim.errors import UserError
from fedsim.events import read_events
from fedsim.files import SUMMARY
from fedsim.journal import Head, Verdict, lines_after, verified
from fedsim.occupancy import CHECKPOINTS, EVENTS, JOURNAL, TRANSFERS
from fedsim.plain import flat, option_text
from fedsim.report import transfers_csv

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, csv.Error, RecursionError)
"""Errors that reading a changed, truncated or removed file may raise."""


def verify(folder: Path) -> Verdict:
    """Checks a run folder: the journal against itself, the checkpoints and the summary, and the results against the journal.

    A finished run without checkpoints is a problem: only the summary would fix the chain. Raises UserError if this is no run folder.
    """
    if not (folder / JOURNAL).exists():
        raise UserError(f"Expected a run folder with {JOURNAL}, got {folder}. Name the folder of a run.")
    heads, damaged, last = {}, [], None
    for path in saved(folder / CHECKPOINTS):
        try:
            last = load(path)
            heads[path.name] = Head.from_json(last.state.get("journal"))
        except DamagedError as error:
            damaged.append(str(error))
        except ValueError:
            damaged.append(f"{path.name} fixes no line of the journal")
    summary, end, wrong = _read_summary(folder / SUMMARY)
    if (folder / SUMMARY).exists() and not heads and not damaged:
        wrong.append(f"{SUMMARY} ends the run, but it has no checkpoint: {CHECKPOINTS}/ was emptied or removed")
    verdict = verified(folder / JOURNAL, heads, end)
    verdict.problems += [*damaged, *wrong, *(_results(folder, summary, verdict.head, last) if end else ())]
    return verdict


def _read_summary(path: Path) -> tuple[dict[str, Any], Head | None, list[str]]:
    """Returns the summary without the journal's head, that head, and the problems with them."""
    if not path.exists():
        return {}, None, []
    try:
        summary = json.loads(path.read_bytes())
        return summary, Head.from_json(summary.pop("journal")), []
    except UNREADABLE:
        return {}, None, [f"{path.name} fixes no line of the journal"]


def _results(folder: Path, summary: dict[str, Any], head: Head, last: Checkpoint | None) -> Iterator[str]:
    """Yields each figure of the summary that another source contradicts, once, and each file that is not as the run wrote it."""
    mine, named = flat(summary), set()
    if last is not None and last.round != summary.get("rounds"):
        last = None
    sources = {
        "the journal's last line": lambda: _journal_figures(folder / JOURNAL, head, mine),
        EVENTS: lambda: _event_figures(folder / EVENTS, mine),
        TRANSFERS: lambda: _transfer_figures(folder / TRANSFERS, last),
    }
    for source, figures_of in sources.items():
        try:
            figures = figures_of()
        except UNREADABLE as error:
            yield f"{source} is not as the run wrote it: {' '.join(str(error).split()):.200}"
            continue
        for key in [key for key in figures if key not in named and mine.get(key) != figures[key]]:
            named.add(key)
            yield f"{SUMMARY} says {key}={option_text(mine.get(key)):.60}, but {source} {option_text(figures[key]):.60}"
    yield from _changed(folder, summary.get("sha256"))


def _changed(folder: Path, hashes: Any) -> Iterator[str]:
    """Yields the files that do not match their hash in the summary; a run of an earlier version has no hashes."""
    for name, wanted in hashes.items() if isinstance(hashes, dict) else ():
        try:
            found = sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
            continue
        if found != wanted:
            yield f"{name} is not as the run wrote it: its SHA-256 is {found[:16]}..., in {SUMMARY} {str(wanted)[:16]}..."


def _journal_figures(path: Path, head: Head, mine: Iterable[str]) -> dict[str, Any]:
    """Returns the figures in the journal's last line, None for those of `mine` that it lacks; {} if an earlier version wrote none."""
    ended = lines_after(path, head.lines - 1)
    return dict.fromkeys(mine) | flat(ended[0]["summary"]) if ended and "summary" in ended[0] else {}


def _event_figures(path: Path, mine: Container[str]) -> dict[str, Any]:
    """Returns those figures of `mine` that the events contain. Raises ValueError if they lack the end of the run."""
    figures: dict[str, Any] = {}
    for event in read_events(path):
        if event["kind"] == "evaluated":
            figures[f"evaluation.{event['task']}.{'final' if event['round'] else 'base'}"] = event
        elif event["kind"] == "round":
            figures["privacy"] = event
        elif event["kind"] == "finished":
            figures |= {"rounds": event["round"], "adapter_digest": event["adapter_digest"]}
    if "rounds" not in figures:
        raise ValueError("the end of the run is missing")
    return {key: value for key, value in flat(figures).items() if key in mine}


def _transfer_figures(path: Path, last: Checkpoint | None) -> dict[str, Any]:
    """Returns the sums of the transfers. Raises ValueError for the first that differs from the ledger of the `last` checkpoint."""
    lines = path.read_text().splitlines()
    if last is not None:
        wanted = transfers_csv(CommunicationLedger.from_json(last.state["state"]["ledger"]).rows()).decode().splitlines()
        for number, (line, right) in enumerate(zip_longest(lines, wanted, fillvalue="nothing"), 1):
            if line != right:
                raise ValueError(f"line {number} is {line:.80}, in the ledger of the last checkpoint {right:.80}")
    ledger = CommunicationLedger()
    ledger.add_rows(csv.DictReader(lines))
    return flat({"communication": ledger.totals()})


def verdict_text(verdict: Verdict) -> str:
    """Returns the verdict as text: what holds, or what does not."""
    if verdict.problems:
        return "\n".join(["The run folder was changed:", *(f"  {problem}" for problem in verdict.problems)])
    again = f", {verdict.superseded} of them superseded by a resumed run" if verdict.superseded else ""
    lines = [f"The journal holds: {verdict.head.lines} lines{again}; head {verdict.head.sha256}"]
    if verdict.finished:
        lines.append(f"{SUMMARY}, {TRANSFERS} and {EVENTS} agree with it.")
    else:
        lines.append("The run has not finished: lines after its last checkpoint could be missing unseen.")
    return "\n".join(
        [*lines, "Anyone who can write this folder could recreate all of its files: compare the head with a copy kept elsewhere."]
    )

"""`fedsim verify`: whether the audit log of a run is as it was written."""

import json
from pathlib import Path

from fedsim.checkpoints import DamagedError, load, saved
from fedsim.errors import UserError
from fedsim.files import SUMMARY
from fedsim.journal import Head, Verdict, verified
from fedsim.run_folder import CHECKPOINTS, JOURNAL


def verify(folder: Path) -> Verdict:
    """Returns what is found in a run folder: the journal against itself, its checkpoints and its summary. Raises UserError for none.

    A finished run has checkpoints; where they are gone, nothing but the summary would fix the chain.
    """
    if not (folder / JOURNAL).exists():
        raise UserError(f"Expected a run folder with {JOURNAL}, got {folder}. Name the folder of a run.")
    heads, damaged = {}, []
    for path in saved(folder / CHECKPOINTS):
        try:
            heads[path.name] = Head.from_json(load(path).state.get("journal"))
        except DamagedError as error:
            damaged.append(str(error))
        except ValueError:
            damaged.append(f"{path.name} fixes no line of the journal")
    end, wrong = _end(folder / SUMMARY)
    if (folder / SUMMARY).exists() and not heads and not damaged:
        wrong.append(f"{SUMMARY} ends the run, but it has no checkpoint: {CHECKPOINTS}/ was emptied or removed")
    verdict = verified(folder / JOURNAL, heads, end)
    verdict.problems += damaged + wrong
    return verdict


def _end(path: Path) -> tuple[Head | None, list[str]]:
    if not path.exists():
        return None, []
    try:
        return Head.from_json(json.loads(path.read_bytes())["journal"]), []
    except (ValueError, KeyError, TypeError):
        return None, [f"{path.name} fixes no line of the journal"]


def verdict_text(verdict: Verdict) -> str:
    """Returns what a person reads: what holds, or where it does not."""
    if verdict.problems:
        return "\n".join(["The journal is not as it was written:", *(f"  {problem}" for problem in verdict.problems)])
    again = f", {verdict.superseded} of them superseded by a resumed run" if verdict.superseded else ""
    lines = [f"The journal holds: {verdict.head.lines} lines{again}; head {verdict.head.sha256}"]
    if not verdict.finished:
        lines.append("The run has not finished: lines after its last checkpoint could be missing unseen.")
    return "\n".join([*lines, "Who can write every file of this folder can remake them all: compare the head with one kept elsewhere."])

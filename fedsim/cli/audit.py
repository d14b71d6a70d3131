"""`fedsim audit`: runs an experiment with canaries in its data and compares a proven lower bound on epsilon with the claim."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsim.audit import Auditor, Finding, check, plain
from fedsim.config import Config
from fedsim.experiment import in_process
from fedsim.files import atomic_write_json
from fedsim.report import table

CANARIES = 128
"""Canaries of an audit whose configuration leaves audit.canaries at 0, the default of a run."""


def audited(config: Config, *, quiet: bool = False) -> dict[str, Any]:
    """Runs and audits the experiment; returns plain values, which it also writes to audit.json in the run folder.

    Raises UserError, before anything is computed, if the configuration cannot be audited.
    """
    config = replace(config, audit=replace(config.audit, canaries=config.audit.canaries or CANARIES))
    check(config)
    auditor = Auditor(config)
    summary = in_process(config, quiet, auditor.watching)
    findings = auditor.findings(summary["privacy"])
    found = {
        "method": summary["method"],
        "init": auditor.init,
        "clients": summary["clients"],
        "rounds": summary["rounds"],
        "seed": summary["seed"],
        "canaries": config.audit.canaries,
        "canaries_inside": auditor.num_inside,
        "confidence": config.audit.confidence,
        "delta": summary["privacy"]["delta"] if summary["privacy"] else 0.0,
        "parts": plain(findings),
        "verdict": verdict(findings),
        "run_dir": summary["run_dir"],
    }
    atomic_write_json(Path(summary["run_dir"]) / "audit.json", found)
    return found


def verdict(findings: dict[str, Finding]) -> str:
    """Returns one sentence on whether the findings contradict the claim."""
    together = findings["together"]
    proven = f"epsilon is at least {together.bound.epsilon:.2f}"
    refuted = [name for name, each in findings.items() if each.refuted]
    if refuted:
        worst = findings[refuted[0]]
        return f"the claim does not hold: {worst.claimed:.2f} for {named(refuted[0])}, but epsilon is at least {worst.bound.epsilon:.2f}"
    if together.claimed == math.inf:
        return f"no epsilon is claimed; {proven}"
    return f"nothing contradicts the claim of {together.claimed:.2f}; {proven}"


def named(part: str) -> str:
    """Returns a part's name for use in a sentence."""
    return part.replace("_", " ")


def audit_table(found: dict[str, Any]) -> str:
    """Returns the findings as text."""
    percent = f"{100 * found['confidence']:g} %"
    head = ["", "claimed epsilon", f"at least ({percent})", "guesses right"]
    rows = [
        [
            named(name),
            "none" if each["claimed_epsilon"] == math.inf else f"{each['claimed_epsilon']:.2f}",
            f"{each['lower_bound']:.2f}" + " !" * each["refuted"],
            f"{each['num_right']} of {each['num_guesses']}",
        ]
        for name, each in found["parts"].items()
    ]
    inside = f"{found['canaries']} canaries, {found['canaries_inside']} of them in the data, delta {found['delta']:.2g}"
    return "\n".join([f"audit of {found['method']}, init {found['init']}: {inside}", "", table(head, rows), "", found["verdict"]])

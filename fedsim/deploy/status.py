"""`fedsim deploy status`: which clients are there, since when, and how far the run has come."""

import json
import subprocess
from pathlib import Path
from typing import Any

from fedsim.deploy.flower import FLWR, flwr
from fedsim.errors import UserError
from fedsim.flower.telling import MARK

SHOW_SECONDS = 30.0


def status(superlink: str, registered: Path | None = None) -> dict[str, Any]:
    """Returns {"nodes": [...], "runs": [...]}; the latest runs come first. `registered` is the folder of register.sh's answers."""
    names = registered_names(registered) if registered else {}
    nodes = [
        {
            "client": names.get(int(node["node-id"]), ""),
            "node": node["node-id"],
            "status": node["status"],
            "since": node["online-at"] if node["status"] == "online" else node["offline-at"],
        }
        for node in flwr("supernode", "list", superlink)["nodes"]
    ]
    runs = [
        {"run": run["run-id"], "status": run["status"], "round": _round(str(run["run-id"]), superlink)}
        for run in flwr("list", superlink)["runs"][:5]
    ]
    return {"nodes": sorted(nodes, key=lambda node: (node["client"], node["node"])), "runs": runs}


def status_table(found: dict[str, Any]) -> str:
    """Returns the status as text for people."""
    lines = [f"{'client':<12} {'node':<22} {'status':<12} since"]
    lines += [f"{node['client'] or '?':<12} {node['node']:<22} {node['status']:<12} {node['since']}" for node in found["nodes"]]
    lines += [f"\n{'run':<22} {'status':<26} round"]
    lines += [f"{run['run']:<22} {run['status']:<26} {run['round']}" for run in found["runs"]]
    return "\n".join(lines)


def registered_names(registered: Path) -> dict[int, str]:
    """Returns the clients' names by node: the SuperLink gives a node to each public key that register.sh has it admit."""
    names = {}
    for path in registered.glob("*.json"):
        text = path.read_text()
        try:
            names[int(json.loads(text[text.find("{") :])["node-id"])] = path.stem
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: expected the SuperLink's answer with a node-id, got {text!r:.60}. Remove it and run register.sh again."
            ) from error
    return names


def registered_clients(registered: Path) -> dict[int, int]:
    """Returns the clients' numbers by node, of those that are registered as client-<number>."""
    numbers = ((node, name.removeprefix("client-")) for node, name in registered_names(registered).items() if name.startswith("client-"))
    return {node: int(number) for node, number in numbers if number.isdecimal()}


def _round(run_id: str, superlink: str) -> str:
    """Returns "3/12" where a run of fedsim has come to its third round, "-" where its log tells no round."""
    command = [*FLWR, "log", run_id, superlink, "--show"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SHOW_SECONDS, check=False)
    rounds, current = "?", ""
    for line in done.stdout.splitlines():
        _, mark, told = line.partition(MARK)
        name, *arguments = json.loads(told) if mark else ("",)
        rounds = str(arguments[0]) if name == "started" else rounds
        current = str(arguments[0]) if name in ("round_started", "round_finished") else current
    return f"{current}/{rounds}" if current else "-"

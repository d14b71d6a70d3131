"""`fedsim deploy status`: which clients are there, since when, and how far the run has come."""

from pathlib import Path
from typing import Any

from fedsim.deploy.flower import flwr, log_of
from fedsim.deploy.registering import registered_names
from fedsim.flower.telling import STARTED, marked


def status(superlink: str, registered: Path | None = None) -> dict[str, Any]:
    """Returns {"nodes": [...], "runs": [...]}; the latest runs come first. `registered` is the folder that `register` writes."""
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


def _round(run_id: str, superlink: str) -> str:
    """Returns "3/12" where a run of fedsim has come to its third round, "-" where its log tells no round."""
    rounds, current = "?", ""
    for line in log_of(run_id, superlink).splitlines():
        name, arguments = marked(line)
        rounds = str(arguments[0]) if name == STARTED and arguments else rounds
        current = str(arguments[0]) if name in ("round_started", "round_finished") and arguments else current
    return f"{current}/{rounds}" if current else "-"

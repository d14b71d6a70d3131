"""`fedsim deploy status`: which clients are connected, when each was last heard from, and how far the run has progressed.

A connected node sends a heartbeat every half minute; after a minute without one it is offline. Flower's command line reports when a node
connected and disconnected, and how long ago it connected by the SuperLink's clock, the only clock used here.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from fedsim.deploy.flower import flwr, log_of
from fedsim.deploy.registering import registered_names
from fedsim.flower.remote_progress import STARTED, marked

UNKNOWN = "unknown"
"""Status of a registered client that the SuperLink does not know, such as after the loss of its database."""
SINCE = {"online": "online-at", "offline": "offline-at", "unregistered": "deleted-at"}
"""The field of Flower's node with the time since which it has had its status."""
UNITS = {"d": 24 * 3600, "h": 3600, "min": 60, "s": 1}


def status(superlink: str, registered: Path | None = None) -> dict[str, Any]:
    """Returns {"nodes": [...], "runs": [...]}; the latest runs come first. `registered` is the folder that `register` writes.

    `heard_seconds_ago` of a node is 0 while it is online, None if it never was, else accurate to the minute's wait for a heartbeat.
    """
    names = registered_names(registered) if registered else {}
    nodes = [_node(node, names.pop(int(node["node-id"]), "")) for node in flwr("supernode", "list", superlink)["nodes"]]
    unheard = {"status": UNKNOWN, "heard_seconds_ago": None, "since": None}
    nodes += [{"client": name, "node": str(node), **unheard} for node, name in names.items()]
    runs = [
        {"run": run["run-id"], "status": run["status"], "round": _round(str(run["run-id"]), superlink)}
        for run in flwr("list", superlink)["runs"][:5]
    ]
    return {"nodes": sorted(nodes, key=lambda node: (node["client"], node["node"])), "runs": runs}


def status_table(found: dict[str, Any]) -> str:
    """Returns the status as a readable table."""
    lines = [f"{'client':<12} {'node':<22} {'status':<12} {'last seen':<12} since"]
    lines += [
        f"{node['client'] or '?':<12} {node['node']:<22} {node['status']:<12} {_heard(node):<12} {node['since'] or '-'}"
        for node in found["nodes"]
    ]
    lines += [f"\n{'run':<22} {'status':<26} round"]
    lines += [f"{run['run']:<22} {run['status']:<26} {run['round']}" for run in found["runs"]]
    return "\n".join(lines)


def _node(node: dict[str, Any], client: str) -> dict[str, Any]:
    connected = _time(node["online-at"])
    disconnected = [time for time in (_time(node["offline-at"]), _time(node["deleted-at"])) if time and connected and time >= connected]
    heard: int | None = None
    if node["status"] == "online":
        heard = 0
    elif connected and disconnected:
        heard = max(0, round(node["online-elapsed"] - (disconnected[0] - connected).total_seconds()))
    since = node[SINCE.get(node["status"], "created-at")]
    return {"client": client, "node": node["node-id"], "status": node["status"], "heard_seconds_ago": heard, "since": since}


def _time(text: str) -> datetime | None:
    """Parses a time written by Flower, None if it is no time."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _heard(node: dict[str, Any]) -> str:
    """Returns "now", "5 min ago", "never" or "unknown"."""
    seconds = node["heard_seconds_ago"]
    if seconds is None:
        return UNKNOWN if node["status"] == UNKNOWN else "never"
    if node["status"] == "online":
        return "now"
    unit = next((unit for unit, length in UNITS.items() if seconds >= 2 * length), "s")
    return f"{seconds // UNITS[unit]} {unit} ago"


def _round(run_id: str, superlink: str) -> str:
    """Returns "3/12" for a run of fedsim in its third round, "-" if its log names no round."""
    rounds, current = "?", ""
    for line in log_of(run_id, superlink).splitlines():
        name, arguments = marked(line)
        rounds = str(arguments[0]) if name == STARTED and arguments else rounds
        current = str(arguments[0]) if name in ("round_started", "round_finished") and arguments else current
    return f"{current}/{rounds}" if current else "-"

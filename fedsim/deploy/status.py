"""`fedsim deploy status`: which clients are there, when each was last heard of, and how far the run has come.

A node that is there tells the SuperLink so every half minute; one that has not for a minute is offline. Flower's command line gives the
times at which a node came and went, and how long ago it came by the SuperLink's own clock, which is the only one that is asked here.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from fedsim.deploy.flower import flwr, log_of
from fedsim.deploy.registering import registered_names
from fedsim.flower.telling import STARTED, marked

UNKNOWN = "unknown"
"""Status of a client that was registered at a SuperLink which knows nothing of it, as after the loss of its database."""
SINCE = {"online": "online-at", "offline": "offline-at", "unregistered": "deleted-at"}
"""Which of Flower's times tells since when a node has had its status."""
UNITS = {"d": 24 * 3600, "h": 3600, "min": 60, "s": 1}


def status(superlink: str, registered: Path | None = None) -> dict[str, Any]:
    """Returns {"nodes": [...], "runs": [...]}; the latest runs come first. `registered` is the folder that `register` writes.

    `heard_seconds_ago` of a node is 0 while it is online, None where it never was, and else right to the minute for which it is waited.
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
    """Returns the status as text for people."""
    lines = [f"{'client':<12} {'node':<22} {'status':<12} {'last heard':<12} since"]
    lines += [
        f"{node['client'] or '?':<12} {node['node']:<22} {node['status']:<12} {_heard(node):<12} {node['since'] or '-'}"
        for node in found["nodes"]
    ]
    lines += [f"\n{'run':<22} {'status':<26} round"]
    lines += [f"{run['run']:<22} {run['status']:<26} {run['round']}" for run in found["runs"]]
    return "\n".join(lines)


def _node(node: dict[str, Any], client: str) -> dict[str, Any]:
    came = _time(node["online-at"])
    went = [time for time in (_time(node["offline-at"]), _time(node["deleted-at"])) if time and came and time >= came]
    heard: int | None = None
    if node["status"] == "online":
        heard = 0
    elif came and went:
        heard = max(0, round(node["online-elapsed"] - (went[0] - came).total_seconds()))
    since = node[SINCE.get(node["status"], "created-at")]
    return {"client": client, "node": node["node-id"], "status": node["status"], "heard_seconds_ago": heard, "since": since}


def _time(text: str) -> datetime | None:
    """Returns the time that Flower writes, None where it writes that there is none."""
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
    """Returns "3/12" where a run of fedsim has come to its third round, "-" where its log tells no round."""
    rounds, current = "?", ""
    for line in log_of(run_id, superlink).splitlines():
        name, arguments = marked(line)
        rounds = str(arguments[0]) if name == STARTED and arguments else rounds
        current = str(arguments[0]) if name in ("round_started", "round_finished") and arguments else current
    return f"{current}/{rounds}" if current else "-"

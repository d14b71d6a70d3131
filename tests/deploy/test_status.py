"""`fedsim deploy status` on a list of nodes as Flower's own command line formats it."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from flwr.cli.supernode.ls import _format_nodes, _to_json
from flwr.proto.node_pb2 import NodeInfo

from fedsim.deploy import status as module
from fedsim.deploy.status import status, status_table

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)


def before(**span):
    return (NOW - timedelta(**span)).isoformat()


NODES = {
    "client-0": NodeInfo(node_id=10, status="online", last_activated_at=before(hours=3), last_deactivated_at=before(hours=4)),
    "client-1": NodeInfo(node_id=11, status="offline", last_activated_at=before(hours=3), last_deactivated_at=before(minutes=5)),
    "client-2": NodeInfo(node_id=12, status="registered"),
    "client-3": NodeInfo(node_id=13, status="offline", last_activated_at=before(days=9), last_deactivated_at=before(days=8)),
    "client-4": NodeInfo(
        node_id=14,
        status="unregistered",
        last_activated_at=before(hours=2),
        last_deactivated_at=before(hours=3),
        unregistered_at=before(seconds=70),
    ),
    "client-5": NodeInfo(node_id=15, status="unregistered", unregistered_at=before(seconds=70)),
}
HEARD = {"client-0": 0, "client-1": 300, "client-2": None, "client-3": 8 * 24 * 3600, "client-4": 70, "client-5": None, "client-6": None}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """The status of a SuperLink that knows these nodes but not one more client that was registered."""
    for number, (name, node) in enumerate({**NODES, "client-6": NodeInfo(node_id=16)}.items()):
        node.registered_at = before(days=10 + number)
        (tmp_path / f"{name}.json").write_text(json.dumps({"node-id": str(node.node_id), "public-key": "a"}))
    listed = json.loads(_to_json(_format_nodes(list(NODES.values()), NOW.isoformat()), verbose=False))
    monkeypatch.setattr(module, "flwr", lambda *words: listed if words[0] == "supernode" else {"runs": []})
    return status("mine", tmp_path)


def test_each_client_has_one_row_with_the_seconds_since_it_was_last_heard(found):
    assert {node["client"]: node["heard_seconds_ago"] for node in found["nodes"]} == HEARD
    assert json.loads(json.dumps(found)) == found


def test_the_table_shows_times_in_words_and_an_unknown_client_as_unknown(found):
    rows = [[row[:12].strip(), row[36:49].strip(), row[49:62].strip(), row[62:]] for row in status_table(found).splitlines()[:8]]
    assert rows == [
        ["client", "status", "last seen", "since"],
        ["client-0", "online", "now", "2026-03-04 09:00:00Z"],
        ["client-1", "offline", "5 min ago", "2026-03-04 11:55:00Z"],
        ["client-2", "registered", "never", "2026-02-20 12:00:00Z"],
        ["client-3", "offline", "8 d ago", "2026-02-24 12:00:00Z"],
        ["client-4", "unregistered", "70 s ago", "2026-03-04 11:58:50Z"],
        ["client-5", "unregistered", "never", "2026-03-04 11:58:50Z"],
        ["client-6", "unknown", "unknown", "-"],
    ]

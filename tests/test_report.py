"""Tables say the numbers they are given; pictures are drawn from events alone."""

import csv
import io
import struct

import pytest

from fedsim.report import MOST_ROWS, curves_png, holdings_table, partition_png, summary_table, transfers_csv

SUMMARY = {
    "method": "fed_sb",
    "rounds": 3,
    "clients": 25,
    "seed": 0,
    "adapter_digest": "ab" * 32,
    "evaluation": {
        "sums": {"base": {"accuracy": 0.025, "loss": 4.5}, "final": {"accuracy": 0.875, "loss": 0.25}, "num_examples": 400},
        "broken": {"base": {"accuracy": 0.5, "loss": 1.0}, "final": {"accuracy": 0.25, "loss": None}, "num_examples": 4},
    },
    "communication": {
        "uplink_bytes": 1234567,
        "downlink_bytes": 7654,
        "setup_bytes": 0,
        "uplink_parameters": 300,
        "downlink_parameters": 1500,
    },
    "training": {"tokens": 5000, "wall_seconds": 62.4, "tokens_per_second": 80.1},
    "run_dir": "runs/mine",
}

EVENTS = [
    {"kind": "initialized", "setup_bytes": 5_000_000},
    *({"kind": "evaluated", "round": r, "task": t, "accuracy": r / 4, "loss": None if r == 2 else 2.0} for r in (0, 2) for t in ("a", "b")),
    *({"kind": "round", "round": r, "train_loss": 1 / r, "uplink_bytes": 1000, "downlink_bytes": 900, "setup_bytes": 0} for r in (1, 2)),
]


def test_the_summary_shows_accuracies_gains_bytes_and_time():
    lines = summary_table(SUMMARY).splitlines()
    sums = next(line for line in lines if line.startswith("sums"))
    assert sums.split() == ["sums", "400", "2.5", "%", "87.5", "%", "+85.0", "4.500", "0.250"]
    broken = next(line for line in lines if line.startswith("broken"))
    assert broken.split()[-3:] == ["-25.0", "1.000", "-"]
    text = " ".join(" ".join(lines).split())
    for told in (
        "25 clients, 3 rounds, seed 0",
        "sent by clients 1.23 MB 300 parameters",
        "sent to clients 7.65 kB",
        "set-up 0 B",
        "1:02 5,000 tokens",
    ):
        assert told in text
    assert "runs/mine/adapter" in text


def test_holdings_are_shown_with_totals_and_long_ones_are_cut():
    text = holdings_table([{"a": 1, "b": 2}, {"a": 30, "b": 0}])
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["a", "b", "all"]
    assert rows[2:] == [["client", "0", "1", "2", "3"], ["client", "1", "30", "0", "30"], ["all", "31", "2", "33"]]
    long = holdings_table([{"a": 1}] * (MOST_ROWS + 7)).splitlines()
    assert len(long) == MOST_ROWS + 4
    assert "... 7 more" in long[-2]
    assert long[-1].split() == ["all", str(MOST_ROWS + 7), str(MOST_ROWS + 7)]


def test_transfers_become_a_csv_with_a_header():
    rows = [{"round": 1, "client": 2, "purpose": "adapter"}, {"round": 1, "client": 3, "purpose": "bases"}]
    read = list(csv.DictReader(io.StringIO(transfers_csv(rows).decode())))
    assert [{**row, "round": int(row["round"]), "client": int(row["client"])} for row in read] == rows
    assert transfers_csv([]) == b""


def png_size(content):
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:3], EVENTS[-2:]])
def test_curves_are_drawn_from_whatever_has_happened(events):
    assert png_size(curves_png(events)) == (1320, 840)


@pytest.mark.parametrize("clients", [1, 25, 200])
def test_the_partition_is_drawn_for_few_and_many_clients(clients):
    holdings = [{f"task{t}": (i + t) % 7 for t in range(3)} for i in range(clients)]
    assert png_size(partition_png(holdings)) == (1320, 480)

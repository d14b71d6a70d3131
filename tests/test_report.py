"""Tables say the numbers they are given; pictures are drawn from events alone."""

import csv
import io
import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from fedsim.core.communication import CommunicationLedger, Direction, Purpose, Transfer
from fedsim.files import finite
from fedsim.report import (
    curves,
    curves_png,
    diagnosis,
    diagnosis_png,
    holdings_bars,
    holdings_table,
    network_curves,
    network_png,
    partition_png,
    privacy_curve,
    privacy_png,
    summary_table,
    transfers_csv,
)

SUMMARY = {
    "privacy": None,
    "missing": {},
    "method": "fed_sb",
    "rounds": 3,
    "clients": 25,
    "seed": 0,
    "rank": 64,
    "adapter_digest": "ab" * 32,
    "evaluation": {
        "sums": {"base": {"accuracy": 0.025, "loss": 4.5}, "final": {"accuracy": 0.875, "loss": 0.25}, "num_examples": 400},
        "broken": {"base": {"accuracy": 0.5, "loss": 1.0}, "final": {"accuracy": 0.25, "loss": float("nan")}, "num_examples": 4},
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
    assert summary_table(finite(SUMMARY)) == summary_table(SUMMARY)  # as it is read back from the run folder
    text = " ".join(" ".join(lines).split())
    for told in (
        "25 clients, 3 rounds, rank 64, seed 0",
        "sent by clients 1.23 MB 300 parameters",
        "sent to clients 7.65 kB",
        "set-up 0 B",
        "1:02 5,000 tokens",
    ):
        assert told in text
    assert "runs/mine/adapter" in text


def test_the_summary_tells_how_many_answers_were_cut_off_where_any_were():
    def lines(base, final):
        sums = {"base": {"accuracy": 0.0, "loss": 1.0} | base, "final": {"accuracy": 0.0, "loss": 1.0} | final, "num_examples": 4}
        text = summary_table(SUMMARY | {"evaluation": SUMMARY["evaluation"] | {"sums": sums, "more": sums}})
        return [line for line in text.splitlines() if line.startswith("cut off")]

    (line,) = lines({"num_cut_off": 600}, {"num_cut_off": 1})
    assert line.startswith("cut off: 1,200 of the base model, 2 of the final one")
    assert lines({"num_cut_off": 0}, {"num_cut_off": 0}) == lines({}, {}) == []


def test_holdings_are_shown_with_totals_and_long_ones_are_cut():
    text = holdings_table([{"a": 1, "b": 2}, {"a": 30, "b": 0}])
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["a", "b", "all"]
    assert rows[2:] == [["client", "0", "1", "2", "3"], ["client", "1", "30", "0", "30"], ["all", "31", "2", "33"]]


def test_the_table_of_many_holdings_is_cut_but_its_totals_are_not():
    holdings = [{"a": i} for i in range(50)]
    cut, whole = (holdings_table(holdings, max_clients).splitlines() for max_clients in (10, None))
    assert cut[2:12] == [f"client {i:<4}  {i:>5}  {i:>5}" for i in range(10)]
    assert cut[12].startswith("... 40 more")
    assert cut[-1].split() == whole[-1].split() == ["all", "1,225", "1,225"]
    assert len(whole) == 2 + 50 + 1


def test_transfers_survive_the_csv():
    ledger = CommunicationLedger()
    ledger.add(Transfer(0, 3, Direction.uplink, Purpose.initial_gradient, 5, 20, 20, 91))
    ledger.add(Transfer(1, 2, Direction.downlink, Purpose.adapter, 7, 28, 28, 120))
    for each in (ledger, CommunicationLedger()):
        text = transfers_csv(each.rows()).decode()
        assert text.splitlines()[0] == "round,client,direction,purpose,parameters,raw_bytes,payload_bytes,serialized_bytes"
        copy = CommunicationLedger()
        copy.add_rows(csv.DictReader(io.StringIO(text)))
        assert copy.to_json() == each.to_json()


def lines_of(axes):
    """{label: [(x, y), ...]} of the points that are seen."""
    return {
        line.get_label(): [(x, pytest.approx(y)) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)] for line in axes.lines
    }


def test_curves_show_what_the_events_say():
    accuracy, loss, training, moved = curves(EVENTS).axes
    assert lines_of(accuracy) == {"a": [(0, 0.0), (2, 50.0)], "b": [(0, 0.0), (2, 50.0)]}
    assert lines_of(loss) == {"a": [(0, 2.0)], "b": [(0, 2.0)]}
    assert list(lines_of(training).values()) == [[(1, 1.0), (2, 0.5)]]
    assert lines_of(moved) == {
        "up": [(0, 0.0), (1, 0.001), (2, 0.002)],
        "down": [(0, 0.0), (1, 0.0009), (2, 0.0018)],
        "set-up": [(0, 5.0), (1, 5.0), (2, 5.0)],
    }
    assert "(MB)" in moved.get_title()
    assert {text.get_text() for text in loss.get_legend().get_texts()} == {"a", "b"}


def test_a_task_without_any_loss_is_named_in_the_legend():
    events = [{"kind": "evaluated", "round": 0, "task": "a", "accuracy": 1.0, "loss": None}]
    assert [text.get_text() for text in curves(events).axes[1].get_legend().get_texts()] == ["a (no loss)"]


@pytest.mark.parametrize("last", [1, 2, 3, 40])
def test_rounds_are_marked_by_whole_numbers(last):
    events = [{"kind": "round", "round": r, "train_loss": 1.0, "uplink_bytes": 1, "downlink_bytes": 1} for r in range(1, last + 1)]
    for axes in curves(events).axes:
        ticks = axes.get_xticks()
        assert len(ticks) >= 2
        assert all(float(tick).is_integer() for tick in ticks)


def png_size(content):
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:3], []])
def test_curves_are_drawn_from_whatever_has_happened(events):
    assert png_size(curves_png(events)) == (1320, 840)


@pytest.mark.parametrize("clients", [1, 25, 60])
def test_the_partition_shows_every_example_once(clients):
    holdings = [{f"task{t}": (i + t) % 7 for t in range(3)} for i in range(clients)]
    (axes,) = holdings_bars(holdings).axes
    tops = [0.0] * clients
    for bars, task in zip(axes.containers, holdings[0], strict=True):
        assert [bar.get_height() for bar in bars] == [held[task] for held in holdings]
        assert [bar.get_y() for bar in bars] == tops
        tops = [bar.get_y() + bar.get_height() for bar in bars]
    assert tops == [sum(held.values()) for held in holdings]
    low, high = axes.get_xlim()
    assert low < -0.5 < clients - 0.5 < high
    assert png_size(partition_png(holdings)) == (1320, 480)


def test_the_bars_of_few_clients_take_the_whole_width():
    (axes,) = holdings_bars([{"a": 1}] * 3).axes
    low, high = axes.get_xlim()
    assert 3 / (high - low) > 0.85


def test_the_only_round_does_not_lie_on_the_edge_of_its_picture():
    one = [{"kind": "round", "round": 1, "train_loss": 1.0, "uplink_bytes": 1000, "downlink_bytes": 900, "setup_bytes": 0}]
    assert {axes.get_xlim() for axes in curves(one).axes} == {(0, 1.5)}
    assert {axes.get_xlim() for axes in curves(EVENTS).axes} == {(0, 2)}


def test_the_partition_of_many_clients_is_drawn_as_outlines():
    holdings = [{f"task{t}": (i + t) % 7 for t in range(3)} for i in range(10_000)]
    (axes,) = holdings_bars(holdings).axes
    bottom = np.zeros(len(holdings))
    for outline, task in zip(axes.patches, holdings[0], strict=True):
        drawn = outline.get_data()
        assert list(drawn.baseline) == list(bottom)
        assert list(drawn.values - bottom) == [held[task] for held in holdings]
        assert list(drawn.edges[:2]) == [-0.5, 0.5]
        bottom = drawn.values


def test_pictures_leave_pyplot_and_its_backend_alone():
    code = "import sys; from fedsim.report import curves_png, partition_png; curves_png([]); partition_png([{'a': 1}])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'matplotlib.pyplot' not in sys.modules"], check=True)


def test_epsilon_is_drawn_by_round_below_its_budget():
    events = [{"kind": "privacy_planned", "budget": 8.0}, *({"kind": "round", "round": r, "epsilon": 2.0 * r} for r in (1, 2, 3))]
    (axes,) = privacy_curve(events).axes
    spent, budget = axes.lines
    assert list(spent.get_ydata()) == [2.0, 4.0, 6.0]
    assert set(budget.get_ydata()) == {8.0}
    assert png_size(privacy_png([])) == (720, 432)


def test_the_summary_tells_epsilon_or_that_none_is_claimed():
    spent = {"unit": "example", "epsilon": 7.994, "delta": 0.0014, "initialization_epsilon": 1.6, "accountant": "prv"}
    assert "7.99   epsilon of one example, largest over clients, of it initialisation 1.60; delta 0.0014, prv" in summary_table(
        SUMMARY | {"privacy": spent}
    )
    for unbounded in (None, float("inf")):
        assert "no epsilon is claimed" in summary_table(SUMMARY | {"privacy": spent | {"epsilon": unbounded}})
    assert "\nprivacy " not in summary_table(SUMMARY)


def test_the_summary_tells_simulated_time():
    network = {"name": "mobile", "mode": "sync", "simulated_seconds": 4000.0}
    assert "1:06:40   set-up and rounds on the network mobile, sync" in summary_table(SUMMARY | {"network": network})
    assert "0.25 s   set-up" in summary_table(SUMMARY | {"network": network | {"simulated_seconds": 0.25}})
    assert "simulated" not in summary_table(SUMMARY)


def test_loss_and_accuracy_are_drawn_over_simulated_time():
    events = [event | ({"simulated_time": 10.0 * event["round"]} if event["kind"] == "round" else {}) for event in EVENTS]
    loss, accuracy = network_curves(events).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10.0, 1.0], [20.0, 0.5]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[0.0, 0.0], [20.0, 50.0]]] * 2
    assert png_size(network_png([])) == (1320, 432)


def test_the_diagnosis_draws_a_line_per_layer_and_says_where_the_average_is_exact():
    facts = [{"kind": "round", "round": r, "drift": 0.5 / r, "effective_rank": 3.0 * r} for r in (1, 2)]
    inexact = [fact | {"deviation": {"a": 0.1, "b": None if fact["round"] == 1 else 0.2}} for fact in facts]
    missed, drift, rank = diagnosis(inexact).axes
    assert list(missed.lines[0].get_ydata()) == [10.0, 10.0]
    assert missed.lines[1].get_ydata()[1] == 20.0
    assert list(drift.lines[0].get_ydata()) == [0.5, 0.25]
    assert list(rank.lines[0].get_ydata()) == [3.0, 6.0]
    assert "it is exact" in diagnosis(facts).axes[0].get_title()
    assert png_size(diagnosis_png([])) == (1320, 432)

"""Pictures show what the events say, read back from the figures themselves."""

import math
import struct
import subprocess
import sys

import numpy as np
import pytest

from fedsim.pictures import (
    curves,
    curves_png,
    diagnosis,
    diagnosis_png,
    holdings_bars,
    network_curves,
    network_png,
    partition_png,
    privacy_curve,
    privacy_png,
)

EVENTS = [
    {"kind": "initialized", "setup_bytes": 5_000_000},
    *({"kind": "evaluated", "round": r, "task": t, "accuracy": r / 4, "loss": None if r == 2 else 2.0} for r in (0, 2) for t in ("a", "b")),
    *({"kind": "round", "round": r, "train_loss": 1 / r, "uplink_bytes": 1000, "downlink_bytes": 900, "setup_bytes": 0} for r in (1, 2)),
]


def lines_of(axes):
    """{label: [(x, y), ...]} of the visible points."""
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
def test_round_axes_have_whole_number_ticks(last):
    events = [{"kind": "round", "round": r, "train_loss": 1.0, "uplink_bytes": 1, "downlink_bytes": 1} for r in range(1, last + 1)]
    for axes in curves(events).axes:
        ticks = axes.get_xticks()
        assert len(ticks) >= 2
        assert all(float(tick).is_integer() for tick in ticks)


def png_size(content):
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:3], []])
def test_curves_are_drawn_from_any_prefix_of_events(events):
    assert png_size(curves_png(events)) == (1320, 840)


@pytest.mark.parametrize("task", ["$\\foo$", "$a_$", "_hidden", "{x}", "%s", "a\\b"])
def test_a_task_may_have_any_name(task):
    events = [{"kind": "evaluated", "round": 0, "task": task, "accuracy": 1.0, "loss": 2.0}]
    assert png_size(curves_png(events)) == (1320, 840)
    assert png_size(partition_png([{task: 3, "b": 1}, {task: 1, "b": 0}])) == (1320, 480)


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


def test_the_bars_of_few_clients_fill_the_width():
    (axes,) = holdings_bars([{"a": 1}] * 3).axes
    low, high = axes.get_xlim()
    assert 3 / (high - low) > 0.85


def test_a_single_round_is_not_drawn_at_the_edge():
    one = [{"kind": "round", "round": 1, "train_loss": 1.0, "uplink_bytes": 1000, "downlink_bytes": 900, "setup_bytes": 0}]
    assert {axes.get_xlim() for axes in curves(one).axes} == {(0, 1.5)}
    assert {axes.get_xlim() for axes in curves(EVENTS).axes} == {(0, 2)}


def test_a_withheld_training_loss_is_labelled():
    def texts_of(draw, loss):
        events = [event | {"train_loss": loss, "simulated_time": 10.0 * event.get("round", 0)} for event in EVENTS]
        return [text.get_text() for axes in draw(events).axes for text in axes.texts]

    for draw in (curves, network_curves):
        assert "withheld: private clients do not report it" in texts_of(draw, None)
        assert "withheld: private clients do not report it" not in texts_of(draw, 1.0)


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


def test_pictures_do_not_import_pyplot():
    code = "import sys; from fedsim.pictures import curves_png, partition_png; curves_png([]); partition_png([{'a': 1}])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'matplotlib.pyplot' not in sys.modules"], check=True)


def test_epsilon_is_drawn_by_round_with_its_budget():
    events = [{"kind": "privacy_planned", "budget": 8.0}, *({"kind": "round", "round": r, "epsilon": 2.0 * r} for r in (1, 2, 3))]
    (axes,) = privacy_curve(events).axes
    spent, budget = axes.lines
    assert list(spent.get_ydata()) == [2.0, 4.0, 6.0]
    assert set(budget.get_ydata()) == {8.0}
    assert png_size(privacy_png([])) == (720, 432)


def test_loss_and_accuracy_are_drawn_over_simulated_time():
    events = [event | ({"simulated_time": 10.0 * event["round"]} if event["kind"] == "round" else {}) for event in EVENTS]
    loss, accuracy = network_curves(events).axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10.0, 1.0], [20.0, 0.5]]]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[0.0, 0.0], [20.0, 50.0]]] * 2
    assert png_size(network_png([])) == (1320, 432)


def test_the_diagnosis_draws_one_line_per_layer_and_says_if_the_average_is_exact():
    facts = [{"kind": "round", "round": r, "drift": 0.5 / r, "effective_rank": 3.0 * r} for r in (1, 2)]
    inexact = [fact | {"deviation": {"a": 0.1, "b": None if fact["round"] == 1 else 0.2}} for fact in facts]
    missed, drift, rank = diagnosis(inexact).axes
    assert list(missed.lines[0].get_ydata()) == [10.0, 10.0]
    assert missed.lines[1].get_ydata()[1] == 20.0
    assert list(drift.lines[0].get_ydata()) == [0.5, 0.25]
    assert list(rank.lines[0].get_ydata()) == [3.0, 6.0]
    texts = [diagnosis([fact | more for fact in facts]).axes[0].texts[0].get_text() for more in ({"deviation": {}}, {})]
    assert texts == ["nothing: the average is exact", "not measured"]
    assert png_size(diagnosis_png([])) == (1320, 432)

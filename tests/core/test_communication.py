"""The ledger against plain sums over a list of transfers."""

import csv
import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core import communication
from fedsim.core.communication import PURPOSES, CommunicationLedger, Direction, Purpose, Transfer

sizes = st.integers(0, 2**50)
transfers = st.builds(
    Transfer, st.integers(0, 4), st.integers(0, 5), st.sampled_from(Direction), st.sampled_from(Purpose), sizes, sizes, sizes, sizes
)


SETUP = (Purpose.bases, Purpose.initial_gradient)


def ledger_of(items: list[Transfer]) -> CommunicationLedger:
    ledger = CommunicationLedger()
    for item in items:
        ledger.add(item)
    return ledger


def plain_totals(items: list[Transfer]) -> dict[str, int]:
    kinds = {
        "uplink": [t for t in items if t.purpose not in SETUP and t.direction is Direction.uplink],
        "downlink": [t for t in items if t.purpose not in SETUP and t.direction is Direction.downlink],
        "setup": [t for t in items if t.purpose in SETUP],
    }
    result = {}
    for kind, chosen in kinds.items():
        result[f"{kind}_parameters"] = sum(t.parameters for t in chosen)
        result[f"{kind}_bytes"] = sum(t.serialized_bytes for t in chosen)
        result[f"{kind}_raw_bytes"] = sum(t.raw_bytes for t in chosen)
        result[f"{kind}_payload_bytes"] = sum(t.payload_bytes for t in chosen)
    return result


@given(st.lists(transfers, max_size=40))
def test_totals_equal_a_plain_sum_over_all_transfers(items: list[Transfer]) -> None:
    ledger = ledger_of(items)
    assert ledger.totals() == plain_totals(items)


@given(st.lists(transfers, max_size=40))
def test_uplink_downlink_and_setup_bytes_sum_to_all_transfers(items: list[Transfer]) -> None:
    totals = ledger_of(items).totals()
    assert totals["uplink_bytes"] + totals["downlink_bytes"] + totals["setup_bytes"] == sum(t.serialized_bytes for t in items)


@given(st.lists(transfers, max_size=40), st.lists(transfers, max_size=40), st.integers(1, 20))
def test_json_keeps_every_transfer_in_order_for_any_block_size(first: list[Transfer], then: list[Transfer], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communication, "BLOCK", block)
        ledger = ledger_of(first)
        copy = CommunicationLedger.from_json(json.loads(json.dumps(ledger.to_json())))
        assert list(copy.rows()) == list(ledger.rows())
        for each in (ledger, copy):  # one has encoded blocks, the other has read them
            for item in then:
                each.add(item)
            again = CommunicationLedger.from_json(json.loads(json.dumps(each.to_json())))
            assert list(again.rows()) == list(ledger_of(first + then).rows())
            assert each.totals() == again.totals() == plain_totals(first + then)


def test_json_is_read_by_name_so_that_a_new_purpose_may_precede_an_old_one() -> None:
    value = ledger_of([Transfer(1, 0, Direction.uplink, Purpose.adapter, 1, 4, 4, 9)]).to_json()
    value["purposes"][PURPOSES.index(Purpose.adapter)] = "fold"
    value["directions"].reverse()
    (row,) = CommunicationLedger.from_json(value).rows()
    assert (row["purpose"], row["direction"]) == ("fold", "downlink")


def test_a_full_block_is_encoded_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "BLOCK", 4)
    ledger = ledger_of([Transfer(1, client, Direction.uplink, Purpose.adapter, 1, 4, 4, 9) for client in range(11)])
    made: list[tuple[int, int]] = []
    encoded = ledger._encoded
    monkeypatch.setattr(ledger, "_encoded", lambda start, stop: made.append((start, stop)) or encoded(start, stop))  # type: ignore[func-returns-value]
    ledger.to_json()
    ledger.to_json()
    assert made == [(0, 4), (4, 8), (8, 11), (8, 11)]


def test_rows_written_as_csv_are_read_back_to_the_same_totals() -> None:
    ledger = ledger_of([Transfer(r, c, d, p, 3, 12, 12, 20 + c) for r in range(2) for c in range(3) for d in Direction for p in Purpose])
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(next(ledger.rows())))
    writer.writeheader()
    writer.writerows(ledger.rows())
    copy = CommunicationLedger()
    copy.add_rows(csv.DictReader(io.StringIO(text.getvalue())))
    assert list(copy.rows()) == list(ledger.rows())
    assert copy.totals() == ledger.totals()


def test_the_ledger_stays_small_for_a_thousand_clients_over_a_hundred_rounds() -> None:
    ledger = CommunicationLedger()
    for round_ in range(100):
        for direction in Direction:
            for client in range(1000):
                ledger.add(Transfer(round_, client, direction, Purpose.adapter, 1024, 4096, 4096, 4200))
    assert sum(sys.getsizeof(column) for column in ledger._columns.values()) < 60 * len(ledger)
    assert len(json.dumps(ledger.to_json())) < len(ledger)
    assert ledger.totals()["uplink_parameters"] == 100 * 1000 * 1024


def test_a_negative_size_is_refused_and_leaves_the_ledger_unchanged() -> None:
    ledger = CommunicationLedger()
    with pytest.raises(ValueError, match="at least 0"):
        ledger.add(Transfer(1, 0, Direction.uplink, Purpose.adapter, -1, 4, 4, 4))
    assert len(ledger) == 0
    assert set(ledger.totals().values()) == {0}

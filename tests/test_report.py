"""Tables and the CSV of transfers show the numbers they are given."""

import csv
import io

from fedsim.core.communication import CommunicationLedger, Direction, Purpose, Transfer
from fedsim.files import finite
from fedsim.report import (
    holdings_table,
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


def test_the_summary_shows_accuracies_gains_bytes_and_time():
    lines = summary_table(SUMMARY).splitlines()
    sums = next(line for line in lines if line.startswith("sums"))
    assert sums.split() == ["sums", "400", "2.5", "%", "87.5", "%", "+85.0", "4.500", "0.250"]
    broken = next(line for line in lines if line.startswith("broken"))
    assert broken.split()[-3:] == ["-25.0", "1.000", "-"]
    assert summary_table(finite(SUMMARY)) == summary_table(SUMMARY)  # as it is read back from the run folder
    text = " ".join(" ".join(lines).split())
    for expected in (
        "25 clients, 3 rounds, rank 64, seed 0",
        "sent by clients 1.23 MB 300 parameters",
        "sent to clients 7.65 kB",
        "set-up 0 B",
        "1:02 5,000 tokens",
    ):
        assert expected in text
    assert "runs/mine/adapter" in text


def test_the_summary_names_an_existing_adapter_and_a_rank_if_there_is_one():
    personal = summary_table(SUMMARY | {"adapter": "adapter/client_3", "rank": None})
    assert '"runs/mine/adapter/client_3")' in personal
    assert "rank" not in personal
    nowhere = summary_table(SUMMARY | {"adapter": None})
    assert "PeftModel" not in nowhere
    assert "at its own worker" in nowhere


def test_the_summary_names_the_existing_files(tmp_path):
    for name in ("summary.json", "privacy.png", "other.txt"):
        (tmp_path / name).touch()
    text = summary_table(SUMMARY | {"run_dir": str(tmp_path)})
    assert f"files     {tmp_path}: summary.json, privacy.png\n" in text


def test_a_meaningless_delta_is_reported():
    spent = {"unit": "client", "epsilon": 8.0, "initialization_epsilon": 0.0, "accountant": "prv"}
    loose, fair = (summary_table(SUMMARY | {"privacy": spent | {"delta": delta}}) for delta in (0.3, 0.03))
    assert "delta 0.3 is hardly a guarantee" in loose
    assert "hardly" not in fair


def test_the_summary_has_the_number_of_cut_off_answers_if_any():
    def lines(base, final):
        sums = {"base": {"accuracy": 0.0, "loss": 1.0} | base, "final": {"accuracy": 0.0, "loss": 1.0} | final, "num_examples": 4}
        text = summary_table(SUMMARY | {"evaluation": SUMMARY["evaluation"] | {"sums": sums, "more": sums}})
        return [line for line in text.splitlines() if line.startswith("cut off")]

    (line,) = lines({"num_cut_off": 600}, {"num_cut_off": 1})
    assert line.startswith("cut off: 1,200 of the base model, 2 of the final one")
    assert lines({"num_cut_off": 0}, {"num_cut_off": 0}) == lines({}, {}) == []
    (line,) = lines({"num_cut_off": 600}, {})
    assert line.startswith("cut off: 1,200 of the base model, those of the final one are not counted"), "clients with models of their own"


def test_holdings_are_shown_with_totals():
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


def test_owners_are_named_beside_their_clients_data():
    text = holdings_table([{"a": 4}, {"a": 2}, {"a": 1}], 2, owners=[["ann", "b\x1b[2Job", "cy", "dee", "eve"], ["flo"], ["gus"]])
    rows = [line.split(maxsplit=4) for line in text.splitlines()]
    assert rows[0] == ["a", "all", "owners"]
    assert rows[2:] == [
        ["client", "0", "4", "4", "ann, b?[2Job, cy and 2 more"],
        ["client", "1", "2", "2", "flo"],
        ["...", "1", "more"],
        ["all", "7", "7"],
    ]


def test_transfers_survive_a_csv_round_trip():
    ledger = CommunicationLedger()
    ledger.add(Transfer(0, 3, Direction.uplink, Purpose.initial_gradient, 5, 20, 20, 91))
    ledger.add(Transfer(1, 2, Direction.downlink, Purpose.adapter, 7, 28, 28, 120))
    for each in (ledger, CommunicationLedger()):
        text = transfers_csv(each.rows()).decode()
        assert text.splitlines()[0] == "round,client,direction,purpose,parameters,raw_bytes,payload_bytes,serialized_bytes"
        copy = CommunicationLedger()
        copy.add_rows(csv.DictReader(io.StringIO(text)))
        assert copy.to_json() == each.to_json()


def test_the_summary_shows_epsilon_or_that_none_is_claimed():
    spent = {"unit": "example", "epsilon": 7.994, "delta": 0.0014, "initialization_epsilon": 1.6, "accountant": "prv"}
    assert "7.99   epsilon of one example, largest over clients, of it initialisation 1.60; delta 0.0014, prv" in summary_table(
        SUMMARY | {"privacy": spent}
    )
    for unbounded in (None, float("inf")):
        assert "no epsilon is claimed" in summary_table(SUMMARY | {"privacy": spent | {"epsilon": unbounded}})
    assert "\nprivacy " not in summary_table(SUMMARY)


def test_the_summary_shows_simulated_time():
    network = {"name": "mobile", "mode": "sync", "simulated_seconds": 4000.0}
    assert "1:06:40   set-up and rounds on the network mobile, sync" in summary_table(SUMMARY | {"network": network})
    assert "0.25 s   set-up" in summary_table(SUMMARY | {"network": network | {"simulated_seconds": 0.25}})
    assert "simulated" not in summary_table(SUMMARY)

"""Small whole runs through the server: their files, their transfers, and the options that must not change the result."""

import csv
import json
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from clients.app import app
from fedsim import __version__, checkpoints
from fedsim.cli.compose import compose
from fedsim.data import load
from fedsim.errors import RunStopped, UserError
from fedsim.events import read_events
from fedsim.experiment import run
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.roster import JOIN, Member, Roster
from fedsim.flower.server import serve
from fedsim.flower.worker import NEEDS_STATE
from fedsim.journal import Journal
from fedsim.models import EMBEDDED
from fedsim.session import open_session

SMALL = (
    *("data.train_examples=30", "data.test_examples=8", "federation.clients=5", "federation.rounds=2", "training.batch_size=2"),
    *("training.local_steps=2", "adapter.rank=4", "adapter.init_samples=5", "evaluation.max_new_tokens=4"),
)


def run_in(folder, *overrides):
    return run(compose([*SMALL, f"run_dir={folder}", *overrides]), quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run_in(folder)


def test_a_run_writes_all_its_files(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "manifest.json", "events.jsonl", "curves.png", "partition.png", "communication.csv"} < names
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < names


def test_the_summary_has_the_expected_fields(finished):
    _, summary = finished
    assert (summary["method"], summary["rounds"], summary["clients"], summary["seed"], summary["privacy"]) == ("fed_sb", 2, 5, 0, None)
    assert len(summary["adapter_digest"]) == 64
    assert set(summary["evaluation"]) == {"arithmetic", "commonsense"}
    for task in summary["evaluation"].values():
        assert task["num_examples"] == 8
        assert {*task["base"], *task["final"]} == {"accuracy", "loss", "num_cut_off"}
    training = summary["training"]
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["wall_seconds"])


def test_evaluation_events_report_the_number_of_cut_off_answers(finished):
    folder, summary = finished
    events = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "evaluated" and event["round"] == 0]
    assert {event["task"]: event["num_cut_off"] for event in events} == {
        task: found["base"]["num_cut_off"] for task, found in summary["evaluation"].items()
    }
    assert all(0 <= event["num_cut_off"] <= 8 for event in events)


def test_counts_of_omitted_and_cut_examples_are_reported_before_the_first_round(tmp_path, capsys):
    limit = 45
    config = compose([*SMALL, f"run_dir={tmp_path / 'run'}", "method=fed_sb", f"data.max_length={limit}"])
    run(config)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    count = lambda text, **options: len(tokenizer(text, **options)["input_ids"])  # noqa: E731
    lengths = [(count(each.prompt), count(each.response, add_special_tokens=False) + 1) for each in load(config.data, config.seed).train]
    left_out = sum(prompt >= limit for prompt, _ in lengths)
    cut = sum(prompt < limit < prompt + response for prompt, response in lengths)
    assert 0 < left_out < cut + left_out < len(lengths)
    events = [event for event in read_events(tmp_path / "run/events.jsonl") if event["kind"] == "too_long"]
    assert [(event["read"], event["left_out"], event["cut"]) for event in events] == [(len(lengths), left_out, cut)]
    line = (
        f"longer than {limit} tokens (data.max_length): of {len(lengths)} training examples {left_out} left out, whose response lies beyond"
    )
    before_first_round = capsys.readouterr().err.partition("round 1/")[0]
    assert f"{line}, {cut} cut\n" in before_first_round


def test_an_error_found_by_clients_leaves_no_run_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length: expected room"):
        run_in(tmp_path / "run", "data.max_length=8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["resume=true"], "to resume"),
        (["privacy=client", "privacy.secure_aggregation=true", "compression=int8"], "compression"),
        (["adapter.rank=193"], "adapter.rank"),
        (["data=gsm8k", "data.path=nowhere.jsonl"], "no such file"),
    ],
)
def test_wrong_folders_options_shapes_and_paths_are_refused_before_loading(tmp_path, monkeypatch, overrides, told):
    monkeypatch.setattr("fedsim.flower.server.open_session", lambda config: pytest.fail("loaded"))
    with pytest.raises(UserError, match=told):
        run_in(tmp_path / "run", *overrides)


def test_communication_csv_adds_up_to_the_summary(finished):
    folder, summary = finished
    rows = list(csv.DictReader((folder / "communication.csv").read_text().splitlines()))
    adapters = [row for row in rows if row["purpose"] == "adapter"]
    for direction in ("uplink", "downlink"):
        mine = [row for row in adapters if row["direction"] == direction]
        assert len(mine) == 5 * 2
        assert sum(int(row["serialized_bytes"]) for row in mine) == summary["communication"][f"{direction}_bytes"]
    setup = sum(int(row["serialized_bytes"]) for row in rows if row["purpose"] != "adapter")
    assert setup == summary["communication"]["setup_bytes"] > 0


def test_held_out_loss_falls_in_a_short_run(finished):
    _, summary = finished
    for task in summary["evaluation"].values():
        assert task["final"]["loss"] < task["base"]["loss"]


@pytest.mark.parametrize("size", [1, 2])
def test_cohorts_of_any_size_give_the_same_adapter_to_float_tolerance(finished, tmp_path, size):
    folder, _ = finished
    run_in(tmp_path / "run", f"engine.cohort_size={size}")
    whole = load_file(folder / "adapter/adapter_model.safetensors")
    parts = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    for name, tensor in whole.items():
        assert (parts[name] - tensor).norm() < 5e-3 * tensor.norm(), name  # Adam amplifies rounding: it divides by the gradient's size


def test_another_seed_gives_another_adapter(finished, tmp_path):
    _, summary = finished
    other = run_in(tmp_path / "run", "seed=1", "adapter.init=orthogonal")
    assert other["adapter_digest"] != summary["adapter_digest"]
    assert other["communication"]["setup_bytes"] == 0


def test_partial_participation_charges_only_the_chosen_clients(tmp_path):
    summary = run_in(tmp_path / "run", "federation.fraction=0.4", "adapter.init=orthogonal")
    rows = list(csv.DictReader((tmp_path / "run/communication.csv").read_text().splitlines()))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    chosen = {(event["round"], client) for event in events if event["kind"] == "round" for client in event["clients"]}
    assert len(chosen) == 2 * 2
    assert {(int(row["round"]), int(row["client"])) for row in rows} == chosen
    assert summary["clients"] == 5


def test_centralised_training_transfers_nothing_and_trains_on_about_as_many_tokens(finished, tmp_path):
    _, federated = finished
    summary = run_in(tmp_path / "run", "method=centralized")
    assert not any(summary["communication"].values())
    assert summary["training"]["tokens"] == pytest.approx(federated["training"]["tokens"], rel=0.2)


def test_events_contain_the_evaluation_of_every_round(tmp_path):
    run_in(tmp_path / "run", "evaluation.every=1", "adapter.init=orthogonal")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["kind"] == "evaluated" and event["task"] == "arithmetic"] == [0, 1, 2]


def test_resuming_a_finished_run_returns_its_summary(finished):
    folder, summary = finished
    assert run_in(folder, "resume=true") == summary


def test_a_client_that_requests_the_state_early_does_not_change_the_result(tmp_path):
    """The server packs factors for this client that initial gradients later replace; a resumed run must not find their digests."""
    asked = []

    def handle(message, context):
        if message.metadata.message_type == "train.initial_gradient" and not asked:
            asked.append(message)
            return Message(RecordDict({NEEDS_STATE: ConfigRecord()}), reply_to=message)
        return app(message, context)

    options = ["evaluation.every=0", "federation.rounds=2"]
    grid = InProcessGrid(handle, workers=1)
    summary = serve(grid, compose([*SMALL, *options, f"run_dir={tmp_path / 'run'}"]), grid.contexts, quiet=True)
    assert asked
    assert summary["adapter_digest"] == run_in(tmp_path / "plain", *options)["adapter_digest"]
    (tmp_path / "run/summary.json").unlink()
    assert run_in(tmp_path / "run", *options, "resume=true")["adapter_digest"] == summary["adapter_digest"]


def checkpoints_seen_by_the_clients(folder, monkeypatch, *, deployed):
    """Returns {round: rounds of the complete checkpoints when its first client was asked to train}, with a slow disk."""
    writing, seen = checkpoints.Store.writing, {}

    def slow_writing(*arguments):
        write = writing(*arguments)
        return lambda: (time.sleep(0.5), write())[1]

    def handle(message, context):
        request = message.content.config_records["request"]
        if message.metadata.message_type == JOIN:
            digest = open_session(config).base_digest
            return Message(Member(context.node_id - 1, 6, digest, __version__, True).to_records(), reply_to=message)
        if message.metadata.message_type == "train":
            seen.setdefault(request["round"], [int(path.stem[-4:]) for path in checkpoints.saved(folder / "checkpoints")])
        return app(message, context)

    monkeypatch.setattr(checkpoints.Store, "writing", slow_writing)
    config = compose([*SMALL, f"run_dir={folder}", "evaluation.every=0", "adapter.init=orthogonal", "federation.rounds=3"])
    grid = InProcessGrid(handle, workers=5)
    serve(grid, config, grid.contexts, roster=Roster(grid, config) if deployed else None, quiet=True)
    return seen


def test_a_deployment_asks_clients_only_after_the_previous_checkpoint_is_written(tmp_path, monkeypatch):
    seen = checkpoints_seen_by_the_clients(tmp_path / "run", monkeypatch, deployed=True)
    assert {round_: rounds[-1] for round_, rounds in seen.items()} == {1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize("init", ["orthogonal", "gradient"])
def test_a_deployment_asks_clients_only_after_the_request_is_synced_to_the_journal(init, tmp_path, monkeypatch):
    folder, durable, seen = tmp_path / "run", [], {}
    sync = Journal.sync

    def sync_and_read(journal):
        sync(journal)
        lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        durable[:] = [entry["round"] for entry in lines if entry["kind"] == "asked"]

    def handle(message, context):
        if message.metadata.message_type == JOIN:
            digest = open_session(config).base_digest
            return Message(Member(context.node_id - 1, 6, digest, __version__, True).to_records(), reply_to=message)
        seen.setdefault(message.content.config_records["request"]["round"], list(durable))
        return app(message, context)

    monkeypatch.setattr(Journal, "sync", sync_and_read)
    config = compose([*SMALL, f"run_dir={folder}", "evaluation.every=0", f"adapter.init={init}", "federation.rounds=2"])
    grid = InProcessGrid(handle, workers=5)
    serve(grid, config, grid.contexts, roster=Roster(grid, config), quiet=True)
    assert len(seen) == (3 if init == "gradient" else 2)
    assert all(asked[-1:] == [number] for number, asked in seen.items())


def test_a_simulation_writes_a_checkpoint_while_the_next_round_trains(tmp_path, monkeypatch):
    seen = checkpoints_seen_by_the_clients(tmp_path / "run", monkeypatch, deployed=False)
    assert seen[2] == [0], "the first round's is under way"
    assert seen[3] == [0, 1]


def test_a_diverged_run_reports_it_once_for_all_clients_with_a_remedy(tmp_path):
    with pytest.raises(RunStopped) as stopped:
        run_in(tmp_path / "run", "training.learning_rate=1e30", "training.local_steps=2", "adapter.init=orthogonal")
    line = str(stopped.value)
    assert line.count("Expected a finite training loss, got nan (") == 1
    assert "lower training.learning_rate" in line
    assert "resume=true" not in line
    assert ".." not in line


def test_a_round_with_too_few_clients_for_its_robust_rule_stops_the_run(tmp_path):
    rule = ("server.rule=krum", "server.malicious=1", "federation.dropout=0.5", "adapter.init=orthogonal")
    with pytest.raises(RunStopped, match=r"round \d has too few clients for krum: Expected .* at least 2 num_malicious \+ 3 clients"):
        run_in(tmp_path / "run", *rule)

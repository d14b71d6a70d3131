"""Whole rounds over simulated links, compared with the ledger and with plain rounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rounds import Rounds, changed, of_method

from fedsim.choices import Mode, PrivacyUnit
from fedsim.config import PrivacyConfig
from fedsim.core.adapters import install
from fedsim.core.fedbuff import staleness_weight
from fedsim.core.missing import Reason
from fedsim.core.network import Link
from fedsim.effective import effective
from fedsim.errors import RunStopped, UserError
from fedsim.experiment import run
from fedsim.flower.simulated import set_up_seconds
from fedsim.local_round import train_clients
from fedsim.privacy.ledger import PrivacyLedger

FAST, SLOW = "{uplink: 8e6, downlink: 8e6, latency: 0.5}", "{uplink: 8e6, downlink: 8e6, latency: 4}"


def network(folder, *rows):
    """Writes a file of links and returns its path."""
    path = folder / "links.yaml"
    path.write_text("".join(f"- {row}\n" for row in rows))
    return str(path)


def bytes_of(rounds, number):
    """Returns each client's serialized bytes of a round, as {client: (down, up)}."""
    clients = {row["client"] for row in rounds.ledger.rows()}
    moved = lambda client, direction: rounds.moved("serialized_bytes", client=client, round=number, direction=direction)  # noqa: E731
    return {client: (moved(client, "downlink"), moved(client, "uplink")) for client in clients}


METHODS = {
    "fed_sb": of_method("fed_sb"),
    "fedit": of_method("fedit"),
    "rolora": of_method("rolora"),
    "flora": of_method("flora"),
    "full": of_method("full"),
    "scaffold": of_method("fed_sb", training={"scaffold": True}),
    "int8": of_method("fed_sb", compression={"name": "int8"}),
    "ranks": of_method("flexlora", adapter={"rank": None}, federation={"ranks": {2: 1.0, 3: 2.0}}),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_bytes_used_for_simulated_times_match_the_ledger(config):
    rounds = Rounds(changed(config, federation={"network": "uniform"}))
    for number in (1, 2):
        charges = rounds.strategy._charges
        predicted = {client: (charges.bytes_down(client), charges.bytes_up(number, client)) for client in range(3)}
        rounds.next()
        assert bytes_of(rounds, number) == predicted


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path):
    rows = ["{uplink: 1e5, downlink: 8e5, latency: 0.25, speed: 500}", "{uplink: 8e6, downlink: 8e6}", "{uplink: 8e6, downlink: 8e6}"]
    rounds = Rounds(of_method("fed_sb", federation={"network": network(tmp_path, *rows)}))
    slowest = train_clients(rounds.session, [0], 1, {})[0].result
    rounds.session.install_state(rounds.state)
    rounds.next()
    down, up = bytes_of(rounds, 1)[0]
    expected = 2 * 0.25 + 8 * down / 8e5 + slowest.num_tokens / 500 + 8 * up / 1e5
    assert rounds.strategy.facts.simulated_seconds == pytest.approx(expected, rel=1e-9)


def test_a_late_client_is_charged_but_not_averaged(tmp_path):
    links = network(tmp_path, FAST, SLOW, FAST)
    config = of_method("fed_sb", federation={"network": links, "deadline": 3.0})
    rounds = Rounds(config)
    rounds.session.install_state(rounds.state)
    uploads = {reply.result.client: reply.arrays["values"] for reply in train_clients(rounds.session, [0, 1, 2], 1, {})}
    rounds.next()
    facts = rounds.strategy.facts
    assert facts.simulated_seconds == 3.0
    assert facts.clients == [0, 2]
    assert [(each.client, each.reason) for each in facts.missing] == [(1, Reason.timeout)]
    assert rounds.moved("parameters", client=1, direction="uplink") == len(uploads[1])
    shares = rounds.shares([0, 2])
    torch.testing.assert_close(rounds.flat("R"), sum(share * uploads[client] for share, client in zip(shares, (0, 2), strict=True)).float())


def test_a_round_waits_past_the_deadline_for_its_quorum(tmp_path):
    slower = SLOW.replace("latency: 4", "latency: 5")
    federation = {"network": network(tmp_path, slower, FAST, SLOW), "deadline": 3.0, "min_replies": 2}
    rounds = Rounds(of_method("fed_sb", federation=federation)).next()
    assert rounds.strategy.facts.clients == [1, 2]
    assert 8 < rounds.strategy.facts.simulated_seconds < 9


def test_over_selection_takes_the_first_replies(tmp_path):
    links = network(tmp_path, SLOW, FAST, SLOW)
    rounds = Rounds(of_method("fed_sb", federation={"network": links, "fraction": 0.34, "over_selection": 2.0})).next()
    facts = rounds.strategy.facts
    assert facts.clients == [1]
    assert {each.client for each in facts.missing} == {0, 2}
    assert 1 < facts.simulated_seconds < 2
    assert all(sizes[1] > 0 for sizes in bytes_of(rounds, 1).values())


def test_a_late_client_is_charged_the_same_privacy_cost(tmp_path):
    private = PrivacyConfig(unit=PrivacyUnit.example, noise_multiplier=1.0)
    config = replace(of_method("fed_sb", federation={"network": network(tmp_path, FAST, SLOW, FAST), "deadline": 3.0}), privacy=private)
    rounds = Rounds(config)
    ledger = PrivacyLedger("example", dict.fromkeys(range(3), 1e-3))
    rounds.strategy.asking._privacy = ledger
    rounds.next()
    assert rounds.strategy.facts.clients == [0, 2]
    assert len({ledger.history(client)[0].steps for client in range(3)}) == 1


def test_link_dropouts_are_determined_by_the_seed(tmp_path):
    links = network(tmp_path, "{uplink: 8e6, downlink: 8e6, dropout: 0.5}", FAST, FAST)
    config = of_method("fed_sb", federation={"network": links, "rounds": 12}, training={"local_steps": 1})
    lost = []
    for _ in range(2):
        rounds, missing = Rounds(config), []
        for _ in range(12):
            missing.append([(each.client, each.reason) for each in rounds.next().strategy.facts.missing])
        lost.append(missing)
    assert lost[0] == lost[1]
    assert {each for missing in lost[0] for each in missing} == {(0, Reason.dropped_out)}
    assert 2 <= sum(map(len, lost[0])) <= 10


# ---- buffered

SPREAD = [f"{{uplink: 8e6, downlink: 8e6, latency: {each}}}" for each in (1, 1.3, 1.7, 4, 9)]


def buffered(folder, method="fed_sb", **federation):
    """Configures a buffered run with five clients of different latency, one of them very slow."""
    options = {"clients": 5, "network": network(folder, *SPREAD), "mode": Mode.fedbuff, "concurrency": 4, "buffer": 2, "rounds": 6}
    return of_method(method, federation={**options, **federation})


@pytest.mark.parametrize("method", ["fed_sb", "fedit"])
def test_a_buffer_of_all_clients_equals_the_synchronous_run(tmp_path, method):
    buffered_run = Rounds(buffered(tmp_path, method, concurrency=5, buffer=5)).next(3)
    reference_run = Rounds(buffered(tmp_path, method, mode=Mode.sync, concurrency=None, buffer=None)).next(3)
    for name, factor in reference_run.state.factors.items():
        torch.testing.assert_close(buffered_run.state.factors[name], factor, rtol=1e-4, atol=1e-6)
    assert buffered_run.totals_by_client() == reference_run.totals_by_client()
    assert buffered_run.strategy.facts.simulated_seconds == pytest.approx(reference_run.strategy.facts.simulated_seconds)


def test_stale_updates_are_weighted_as_in_a_replay_of_all_versions(tmp_path):
    """The reference retrains each client, one at a time, from the version it was sent."""
    rounds = Rounds(buffered(tmp_path))
    versions, ages = [rounds.flat("R")], []
    layout = rounds.spec.layout(("R",))
    counts = [len(rounds.session.client_data(client).examples) for client in range(5)]
    for number in range(1, 7):
        flush, _ = rounds.strategy._simulation.flush(number)
        rounds.next()
        shares = np.array([counts[job.client] for job in flush.arrived], dtype=float)
        expected = versions[-1].double()
        for share, job in zip(shares / shares.sum(), flush.arrived, strict=True):
            install(rounds.session.model, layout.unpack(versions[job.version]))
            trained = train_clients(rounds.session, [job.client], job.version + 1, {})[0].arrays["values"]
            ages.append(number - 1 - job.version)
            expected += share * staleness_weight(ages[-1]) * (trained - versions[job.version]).double()
        versions.append(rounds.flat("R"))
        torch.testing.assert_close(versions[-1].double(), expected, rtol=1e-4, atol=1e-6)
        assert rounds.strategy.facts.staleness == ages[-len(flush.arrived) :]
        rounds.session.digests.clear()
    assert max(ages) >= 2


def test_an_upload_is_charged_when_it_arrives(tmp_path):
    rounds = Rounds(buffered(tmp_path))
    for number in range(1, 5):
        flush, queue = rounds.strategy._simulation.flush(number)
        rounds.next()
        up = {client for client, (_, sent) in bytes_of(rounds, number).items() if sent}
        down = {client for client, (got, _) in bytes_of(rounds, number).items() if got}
        assert up == {job.client for job in flush.arrived}
        assert down == {job.client for job in flush.begun}
        assert set(rounds.state.buffer.updates) == {job.number for job in queue.working}


def test_a_buffered_run_does_not_depend_on_cohorts_and_workers(tmp_path):
    buffered_run = Rounds(buffered(tmp_path)).next(4)
    reference_run = Rounds(changed(buffered(tmp_path), engine={"cohort_size": 1}), workers=2).next(4)
    torch.testing.assert_close(reference_run.flat("R"), buffered_run.flat("R"), rtol=1e-4, atol=1e-6)
    assert reference_run.state.buffer.queue == buffered_run.state.buffer.queue
    assert reference_run.totals_by_client() == buffered_run.totals_by_client()


def test_refused_updates_do_not_enter_the_buffer_and_are_charged(tmp_path):
    rounds = Rounds(changed(buffered(tmp_path), server={"max_update_norm": 1e-9}))
    start = rounds.flat("R")
    with pytest.raises(RunStopped, match=r"buffer of round 1, but all that arrived were refused: .*max_update_norm"):
        rounds.next()
    torch.testing.assert_close(rounds.flat("R"), start)
    assert rounds.state.buffer.updates == {}
    assert {each.reason for each in rounds.strategy.facts.missing} == {Reason.refused_by_server}
    assert rounds.moved("serialized_bytes", direction="uplink") > 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (of_method("fed_sb", federation={"mode": Mode.fedbuff}), "choose federation.network"),
        (of_method("fed_sb", federation={"deadline": 2.0}), "simulated network"),
        (of_method("fed_sb", federation={"buffer": 2}), "only fedbuff"),
        (of_method("flora", federation={"mode": Mode.fedbuff, "network": "mobile"}), "flora produces updates"),
        (of_method("rolora", federation={"mode": Mode.fedbuff, "network": "mobile"}), "rolora produces updates"),
        (of_method("fed_sb", federation={"mode": Mode.fedbuff, "network": "mobile"}, training={"scaffold": True}), "scaffold"),
        (of_method("fed_sb", federation={"mode": Mode.fedbuff, "network": "mobile", "buffer": 3, "concurrency": 2}), "concurrency"),
        (of_method("fed_sb", federation={"mode": Mode.fedbuff, "network": "mobile", "deadline": 1.0}), "no update is too late"),
        (of_method("fed_sb", federation={"network": "carrier pigeon"}), "or a file"),
        (of_method("centralized", federation={"network": "mobile"}), "something is sent"),
    ],
)
def test_meaningless_network_and_mode_options_are_refused(config, reason):
    with pytest.raises(UserError, match=reason):
        effective(config)


def test_fedbuff_with_privacy_or_secure_aggregation_is_refused():
    config = of_method("fed_sb", federation={"mode": Mode.fedbuff, "network": "mobile"})
    with pytest.raises(UserError, match="no epsilon is planned"):
        effective(replace(config, privacy=PrivacyConfig(unit=PrivacyUnit.example, epsilon=1.0)))
    with pytest.raises(UserError, match="no simulated times"):
        effective(replace(config, privacy=PrivacyConfig(secure_aggregation=True)))


def test_a_run_reports_simulated_time_in_events_and_summary_and_draws_it(tmp_path):
    config = of_method("fed_sb", federation={"network": network(tmp_path, FAST, SLOW, FAST), "deadline": 3.0})
    config = changed(config, data={"test_examples": 1}, evaluation={"max_new_tokens": 1})
    summary = run(replace(config, run_dir=str(tmp_path / "run")), quiet=True)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["kind"] == "round"]
    assert [event["simulated_seconds"] for event in rounds] == [3.0, 3.0]
    assert [event["simulated_time"] for event in rounds] == [3.0, 6.0]
    expected = {"name": config.federation.network, "mode": "sync", "simulated_seconds": 6.0}
    assert summary["network"] == expected
    assert summary["missing"] == {"timeout": 2}
    assert (tmp_path / "run" / "network.png").stat().st_size > 1000


def test_setup_lasts_as_long_as_its_slowest_client():
    links = [Link(8e6, 8e6, 0.5, 0.0, 1.0), Link(8e3, 8e6, 0.1, 0.0, 1.0)]
    rows = [
        {"client": 0, "direction": "uplink", "serialized_bytes": 10_000_000},
        {"client": 1, "direction": "uplink", "serialized_bytes": 20_000},
        {"client": 1, "direction": "downlink", "serialized_bytes": 1_000_000},
    ]
    assert set_up_seconds(links, rows) == pytest.approx(max(1.0 + 10.0, 0.2 + 20.0 + 1.0))
    assert set_up_seconds(None, rows) == 0.0

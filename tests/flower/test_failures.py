"""Clients that die, return, or reply too late: rounds continue without them, and lost replies have no effect."""

from dataclasses import replace

import pytest
import torch
from faults import SILENT, FaultyGrid, faulty, place
from flwr.app import ConfigRecord, Error, Message, RecordDict
from rounds import of_method

from fedsim.choices import Init, Optimizer
from fedsim.core.missing import Reason
from fedsim.effective import effective
from fedsim.errors import RunStopped, UserError
from fedsim.events import read_events
from fedsim.flower import gathering
from fedsim.flower import strategy as strategy_module
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.records import serialized_bytes
from fedsim.flower.server import serve
from fedsim.flower.worker import INITIAL_GRADIENT, NEEDS_STATE, handle
from fedsim.initial_gradient import client_gradient

SOON = {"round_timeout": 60.0, "clients": 4}


class Clock:
    """A clock that advances only while waiting, so that a busy machine does not matter."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    for module in (gathering, strategy_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def config_of(method="fed_sb", **federation):
    return of_method(method, federation={**SOON, **federation}, data={"train_examples": 32})


def without(clients, config, rounds=1):
    """Returns the flat R of a run in which these clients never participate."""
    run = faulty(config, {})
    run.strategy.asking.participants = lambda number: [c for c in range(config.federation.clients) if c not in clients]
    return run.next(rounds).flat("R")


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [(SILENT, Reason.timeout, "no reply within"), ("CUDA out of memory", Reason.died, "CUDA out of memory")],
)
def test_a_round_continues_without_a_missing_client_and_the_other_weights_sum_to_one(fault, reason, detail, clock):
    run = faulty(config_of(), {(1, 2): fault}).next()
    assert clock.now == pytest.approx(60 if fault == SILENT else 0)
    (missing,) = run.strategy.facts.missing
    assert (missing.client, missing.round, missing.reason) == (2, 1, reason)
    assert detail in missing.detail
    assert sum(run.strategy.facts.shares) == pytest.approx(1)
    torch.testing.assert_close(run.flat("R"), without({2}, config_of()), rtol=0, atol=0)


def test_an_error_reply_is_reported_at_once_without_a_deadline(clock):
    run = faulty(config_of(round_timeout=None), {(1, 2): "node unavailable"}).next()
    assert clock.now == 0
    assert [each.reason for each in run.strategy.facts.missing] == [Reason.died]


def test_a_grid_that_blocks_in_pull_is_polled_again_without_sleeping(clock):
    run, polls = faulty(config_of(), {}), iter(range(1000))
    pull = run.grid.pull_messages

    def waiting(message_ids):
        clock.now += 1.0
        return pull(message_ids) if next(polls) >= 20 else []

    run.grid.pull_messages = waiting
    run.next()
    assert clock.now == 20 + len(run.strategy.facts.clients), "a second for each look and none between"


def test_a_disconnected_client_is_missing_and_not_charged():
    run = faulty(config_of(), {})
    run.grid.down = {1}
    run.next()
    assert [(each.client, each.reason) for each in run.strategy.facts.missing] == [(1, Reason.died)]
    assert run.moved(client=1) == 0


def test_a_round_below_the_quorum_retries_only_the_missing_clients():
    run = faulty(config_of(min_replies=4), {(1, 2): "died", (1, 3): "died"})
    push = run.grid.push_messages

    def push_without_faults(messages):
        if len(run.grid.asked) == 4:  # all were asked once
            run.grid.faults = {}
        return push(messages)

    run.grid.push_messages = push_without_faults
    run.next()
    assert run.grid.asked == [(1, client) for client in (0, 1, 2, 3, 2, 3)]
    assert run.strategy.facts.num_attempts == 2
    assert run.strategy.facts.missing == []
    torch.testing.assert_close(run.flat("R"), without(set(), config_of()), rtol=0, atol=1e-7)


def test_a_round_that_stays_below_the_quorum_stops_the_run_with_its_state_unchanged():
    run = faulty(config_of(min_replies=0.75, retries=1), {(2, 0): SILENT, (2, 3): "died"}).next()
    before = run.flat("R")
    with pytest.raises(RunStopped, match=r"at least 3 clients \(federation\.min_replies\), got 2, 2 missing \(1 timeout, 1 died\).*resume"):
        run.next()
    assert torch.equal(run.flat("R"), before)
    assert [each for each in run.grid.asked if each[0] == 2] == [(2, 0), (2, 1), (2, 2), (2, 3), (2, 0), (2, 3)]


def test_a_refused_client_is_not_asked_again():
    run = faulty(config_of(min_replies=4), {(1, 0): lambda reply: reply})
    run.grid.faults[1, 0] = lambda reply: _of_round(reply, 0)
    with pytest.raises(RunStopped, match="1 refused by server"):
        run.next()
    assert len(run.grid.asked) == 4


def _of_round(reply, number):
    reply.content.metric_records["metrics"]["round"] = number
    return reply


def test_a_client_that_never_replied_is_recorded_without_state_and_can_rejoin():
    run = faulty(config_of(), {(1, 2): SILENT}).next()
    state = run.state
    assert all(state.exchange.holds(2, part) <= 0 for part in state.exchange.versions)
    assert state.exchange.holds(1, "R") == 0
    run.next()
    assert run.strategy.facts.missing == []
    assert run.moved(client=2, round=2, direction="downlink") == run.moved(client=1, round=2, direction="downlink")


@pytest.mark.parametrize("options", [{"method": "flora"}, {"method": "fedex_lora"}])
def test_a_client_that_missed_folds_receives_the_whole_sum(options):
    run = faulty(config_of(**options), {(1, 2): SILENT, (2, 2): "died"}).next(3)
    assert run.strategy.facts.missing == []
    charged = [run.moved(client=client, round=3, direction="downlink", purpose="fold") for client in (1, 2)]
    assert charged[1] != charged[0] > 0, "the whole sum in place of the last increment"


@pytest.mark.parametrize(
    "sections",
    [
        {"method": "fedsa_lora"},
        {"method": "fed_sb", "training": {"scaffold": True, "optimizer": Optimizer.sgd}},
        {"method": "fedit", "compression": {"name": "top_k", "density": 0.3, "error_feedback": True}},
    ],
    ids=["personal factors", "control variates", "residues"],
)
def test_a_client_whose_upload_was_refused_continues_as_if_never_asked(sections):
    options = {name: value for name, value in sections.items() if name != "method"}
    config = of_method(sections["method"], federation={**SOON, "rounds": 3}, data={"train_examples": 32}, **options)

    run, never = faulty(config, {}), faulty(config, {})
    run.grid.faults[2, 1] = lambda reply: _of_round(reply, 1)  # it trains, but its upload is refused
    never.grid.faults[2, 1] = SILENT
    for each in (run, never):
        each.next(3)
    assert [missing.client for missing in run.strategy.facts.missing] == []
    kinds = run.session.method.uploaded(1)
    assert torch.equal(run.flat(*kinds), never.flat(*kinds))


def test_a_late_reply_to_an_earlier_round_is_never_pulled():
    run = faulty(config_of(), {(1, 2): SILENT}).next()
    run.grid.faults = {}  # its reply to round 1 is available now
    run.next()
    assert sorted(run.strategy.facts.clients) == [0, 1, 2, 3]
    assert len(run.grid._pending) == 1, "nobody has pulled it"


def test_over_selected_spare_clients_replace_missing_ones():
    config = config_of(clients=6, fraction=0.5, over_selection=0.5)
    plain = faulty(config_of(clients=6, fraction=0.5), {}).next()
    run = faulty(config, {}).next()
    assert torch.equal(run.flat("R"), plain.flat("R")), "those that a round wants come first"
    wanted, spare = run.strategy.participants(1), run.strategy.asking.spares(1)
    assert (len(wanted), len(spare)) == (3, 2)
    assert not set(wanted) & set(spare)
    gap = faulty(config, {(1, wanted[0]): "died"}).next()
    assert set(gap.strategy.facts.clients) == {*wanted[1:], spare[0]}


def test_initial_gradients_are_summed_without_dead_clients():
    config = of_method("fed_sb", federation=SOON, data={"train_examples": 32}, adapter={"init": Init.gradient, "init_samples": 8})
    run = faulty(config, {(0, 3): "died"})
    gradients = run.strategy.initial_gradients(run.grid)
    expected = sum(client_gradient(run.session, client, 2).double() for client in range(3))
    torch.testing.assert_close(run.session.gradient_parts.layout.pack(gradients), expected.float())
    assert [each.client for each in run.strategy.facts.missing] == [3]


@pytest.mark.parametrize("method", ["fed_sb", "fedex_lora"])
def test_a_request_resent_to_a_worker_that_lacks_the_state_is_charged_again(method):
    pushed = []

    class Forgetful(FaultyGrid):
        """Records the requests of round 2 to client 1, whose first reply says that its worker lacks the state."""

        def push_messages(self, messages):
            messages = list(messages)
            pushed.extend(message for message in messages if place(message) == (2, 1))
            return super().push_messages(messages)

    def lacks(reply):
        return Message(RecordDict({NEEDS_STATE: ConfigRecord()}), metadata=reply.metadata) if len(pushed) == 1 else reply

    run = faulty(of_method(method, federation=SOON, data={"train_examples": 32}), {(2, 1): lacks})
    run.grid = Forgetful(4, run.grid.faults)
    run.next(2)
    sent = sum(serialized_bytes(record) for message in pushed for record in message.content.array_records.values())
    assert len(pushed) == 2
    assert run.moved("serialized_bytes", client=1, direction="downlink", round=2) == sent
    assert sorted(run.strategy.facts.clients) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("federation", "message"),
    [
        ({"min_replies": 9}, "a whole number up to the 4 clients"),
        ({"min_replies": 1.5}, "a part below 1"),
        ({"over_selection": 0.5}, "every client is drawn already"),
    ],
)
def test_an_impossible_quorum_or_over_selection_is_refused(federation, message):
    with pytest.raises(UserError, match=message):
        effective(config_of(**federation))


def dead_for_gradients(*clients):
    """Returns a one-node Grid on which the initial gradients of these clients fail."""

    def answer(message, context):
        asked = list(message.content.config_records["request"]["clients"])
        if message.metadata.message_type == INITIAL_GRADIENT and set(asked) & set(clients):
            return Message(Error(1, "the machine is down"), reply_to=message)
        return handle(message, context)

    return InProcessGrid(answer)


def served(folder, grid, **privacy):
    federation = {"rounds": 1, "min_replies": 0.6}
    config = of_method("fed_sb", federation=federation, adapter={"init": Init.gradient}, privacy=privacy, evaluation={"max_new_tokens": 2})
    return serve(grid, replace(config, run_dir=str(folder)), grid.contexts, quiet=True)


@pytest.mark.parametrize("secure", [False, True])
def test_missing_initial_gradients_are_reported_in_the_summary_and_events(tmp_path, secure):
    summary = served(tmp_path / "run", dead_for_gradients(1), secure_aggregation=secure)
    assert summary["missing"] == {"died": 1}
    missing_events = [event["missing"] for event in read_events(tmp_path / "run/events.jsonl") if event["kind"] == "missing_gradients"]
    assert [[(each["client"], each["reason"]) for each in missing] for missing in missing_events] == [[(1, "died")]]


@pytest.mark.parametrize("secure", [False, True])
def test_too_few_initial_gradients_stop_the_run_and_keep_its_folder(tmp_path, secure):
    with pytest.raises(RunStopped):
        served(tmp_path / "run", dead_for_gradients(1, 2), secure_aggregation=secure)
    assert (tmp_path / "run/journal.jsonl").exists()

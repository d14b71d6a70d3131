"""The roster of a deployment, over a Grid whose nodes connect, disconnect and answer as each test decides."""

from dataclasses import replace

import pytest
from flwr.app import Error, Message
from rounds import BASE, changed

import fedsim
from fedsim.choices import Accountant, PrivacyUnit
from fedsim.errors import UserError
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.roster import JOIN, Member, Roster
from fedsim.report import holdings_table
from fedsim.session import open_session
from fedsim.training.private import sampling_rate

CONFIG = changed(BASE, engine={"wait_seconds": 0.3})  # three clients


class Nodes:
    """Nodes and their answers to the join request: a member, or a reason for refusing."""

    def __init__(self, config=CONFIG):
        self.session = open_session(config)
        self.answers, self.asked, self.events = {}, [], []
        self.grid = InProcessGrid(self._answer, workers=5)
        self.contexts = dict(self.grid.contexts)
        self.present([])

    def _answer(self, message, context):
        assert message.metadata.message_type == JOIN
        self.asked.append(context.node_id)
        answer = self.answers[context.node_id]
        content = answer.to_records() if isinstance(answer, Member) else Error(1000, answer)
        return Message(content, reply_to=message)

    def present(self, nodes):
        self.grid.contexts = {node: self.contexts[node] for node in nodes}

    def member(self, number, **changes):
        return replace(Member(number, 10 + number, self.session.base_digest, fedsim.__version__, True), **changes)

    def record(self, kind, **facts):
        self.events.append((kind, facts.get("client", facts.get("clients", facts.get("reason")))))


def test_clients_are_mapped_to_the_nodes_that_report_their_number():
    nodes = Nodes()
    nodes.answers = {1: nodes.member(2, shard=False), 3: nodes.member(0), 5: nodes.member(1, shard=False)}
    nodes.present([1, 3, 5])
    roster = Roster(nodes.grid, CONFIG)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 2]) == {0: 3, 2: 1}
    assert nodes.session.own_data == {1: 11, 2: 12}
    assert [held["own data"] for held in nodes.session.holdings] == [0, 11, 12]
    assert holdings_table(nodes.session.holdings).count("own data") == 1
    nodes.session.set_own_data_sizes({})
    assert all("own data" not in held for held in nodes.session.holdings)
    assert sorted(nodes.events) == [("joined", 0), ("joined", 1), ("joined", 2)]
    assert sorted(nodes.asked) == [1, 3, 5], "each is asked once"


def test_nodes_that_disconnect_or_connect_are_noticed_before_the_next_round():
    nodes = Nodes()
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1), 4: nodes.member(0)}
    nodes.present([1, 2])
    roster = Roster(nodes.grid, CONFIG)
    roster.wait_for_clients(nodes.session, nodes.record)
    nodes.present([2])
    assert roster.client_nodes([0, 1]) == {1: 2}
    nodes.present([2, 4])
    assert roster.client_nodes([0, 1]) == {0: 4, 1: 2}
    assert nodes.events[2:] == [("left", 0), ("absent", [0]), ("joined", 0)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Refused by the owner of client 0: too many steps", "too many steps"),
        ({"base_digest": "other"}, "has another base model, tokenizer or chat template than the server"),
        ({"client": 9}, "there is no client 9 among 3"),
        ({"num_examples": 10**15}, "federation.max_examples is"),
        ({"version": "0.0.9"}, "runs fedsim 0.0.9, the server"),
        ({"num_examples": 0}, "Expected an answer with client, num_examples"),
    ],
)
def test_a_client_that_does_not_fit_is_refused_with_the_reason(answer, reason):
    nodes = Nodes()
    nodes.answers = {1: nodes.member(0, **answer) if isinstance(answer, dict) else answer, 2: nodes.member(1)}
    nodes.present([1, 2])
    roster = Roster(nodes.grid, CONFIG)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1, 2]) == {1: 2}
    ((_, found),) = [event for event in nodes.events if event[0] == "refused"]
    assert reason in found


def test_a_second_node_of_a_client_is_refused():
    nodes = Nodes()
    nodes.answers = {1: nodes.member(0), 2: nodes.member(0)}
    nodes.present([1, 2])
    roster = Roster(nodes.grid, CONFIG)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert len(roster.client_nodes([0])) == 1
    assert ("refused", "client 0 already has a node") in nodes.events


PRIVATE = changed(CONFIG, privacy={"unit": PrivacyUnit.example, "epsilon": 8.0, "accountant": Accountant.rdp})


@pytest.mark.parametrize("stranger", [7, 0])
def test_an_unknown_or_duplicate_client_does_not_end_the_wait(stranger, monkeypatch):
    nodes = Nodes()
    config = changed(CONFIG, engine={"wait_seconds": 60.0})
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1), 3: nodes.member(stranger), 4: nodes.member(2)}
    nodes.present([1, 2, 3])
    monkeypatch.setattr("fedsim.flower.roster.time.sleep", lambda _: nodes.present([1, 2, 3, 4]))  # client 2 connects later
    roster = Roster(nodes.grid, config)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1, 2]) == {0: 1, 1: 2, 2: 4}


@pytest.mark.parametrize("answer", ["busy", 2])
def test_the_roster_does_not_wait_for_a_refused_client(answer, monkeypatch):
    nodes = Nodes()
    config = changed(CONFIG, engine={"wait_seconds": 60.0})
    refused = answer if isinstance(answer, str) else nodes.member(answer, version="0.0")
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1), 3: refused}
    nodes.present([1, 2, 3])
    monkeypatch.setattr("fedsim.flower.roster.time.sleep", pytest.fail)
    roster = Roster(nodes.grid, config)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1, 2]) == {0: 1, 1: 2}


def test_the_noise_of_a_late_client_is_planned_for_its_own_data_before_its_first_round():
    nodes = Nodes(PRIVATE)
    nodes.session.set_own_data_sizes({})
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1, num_examples=5, shard=False)}
    nodes.present([1])
    roster = Roster(nodes.grid, PRIVATE)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert nodes.session.privacy_plan[1].num_examples != 5
    nodes.present([1, 2])
    assert roster.client_nodes([0, 1]) == {0: 1}, "in the round that has begun it was charged for other data"
    roster.begin_round()
    assert roster.client_nodes([0, 1]) == {0: 1, 1: 2}
    planned = nodes.session.privacy_plan[1]
    assert (planned.num_examples, planned.rate) == (5, sampling_rate(5, PRIVATE.training.batch_size))
    assert planned.delta == pytest.approx(5**-1.1)


def test_a_client_whose_data_size_conflicts_with_delta_is_refused_alone():
    nodes = Nodes(changed(PRIVATE, privacy={"delta": 0.01}))
    nodes.session.set_own_data_sizes({})
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1, num_examples=200, shard=False)}
    nodes.present([1, 2])
    roster = Roster(nodes.grid, nodes.session.config)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1]) == {0: 1}
    ((_, reason),) = [event for event in nodes.events if event[0] == "refused"]
    assert "delta" in reason


def test_a_node_joins_only_as_the_client_its_key_is_registered_for():
    nodes = Nodes()
    nodes.answers = {1: nodes.member(1), 2: nodes.member(0), 3: nodes.member(1), 4: nodes.member(2), 5: nodes.member(0)}
    registered = {1: 0, 3: 1}
    nodes.present([1, 2, 3, 4])
    roster = Roster(nodes.grid, CONFIG, lambda: registered)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1, 2]) == {1: 3, 2: 4}, "client 2 is registered nowhere that the server knows of"
    assert [reason for kind, reason in nodes.events if kind == "refused"] == [
        "node 1 claims to be client 1, but its key is registered for client 0",
        "node 2 claims to be client 0, but its key is registered for no client",
    ]
    registered[5] = 2  # during the run
    nodes.present([3, 4, 5])
    roster.client_nodes([0])
    assert ("refused", "node 5 claims to be client 0, but its key is registered for client 2") in nodes.events


def test_without_any_client_an_error_says_why():
    nodes = Nodes()
    with pytest.raises(UserError, match=r"engine\.wait_seconds=0\.3, but: no SuperNode is connected"):
        Roster(nodes.grid, CONFIG).wait_for_clients(nodes.session, nodes.record)
    nodes.answers = {1: "not on Sundays"}
    nodes.present([1])
    with pytest.raises(UserError, match="not on Sundays"):
        Roster(nodes.grid, CONFIG).wait_for_clients(nodes.session, nodes.record)


def test_a_node_whose_join_request_could_not_be_sent_is_asked_again(monkeypatch):
    nodes = Nodes()
    nodes.answers = {1: nodes.member(0), 2: nodes.member(1)}
    nodes.present([1, 2])
    push, failing = nodes.grid.push_messages, {2}

    def push_unless_failing(messages):
        (message,) = messages
        node = message.metadata.dst_node_id
        return [""] if node in failing else push([message])

    monkeypatch.setattr(nodes.grid, "push_messages", push_unless_failing)
    roster = Roster(nodes.grid, CONFIG)
    roster.wait_for_clients(nodes.session, nodes.record)
    assert roster.client_nodes([0, 1]) == {0: 1}
    failing.clear()
    assert roster.client_nodes([0, 1]) == {0: 1, 1: 2}

"""Rounds whose clients are workers of a deployment, each with its owner, its memory and its accountant; only the wires are missing."""

import json
import os
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from rounds import CLIENTS, Rounds, of_method

from clients.desk import Desk
from clients.owner import Owner
from fedsim.choices import Init, PrivacyUnit, Weighting
from fedsim.core.missing import Reason
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.records import from_record, record_of
from fedsim.flower.requests import METRICS
from fedsim.flower.roster import JOIN, Member
from fedsim.flower.strategy import FedsimStrategy
from fedsim.flower.worker import INITIAL_GRADIENT, REFUSED, client_key
from fedsim.local_round import train_clients
from fedsim.plain import to_dict
from fedsim.privacy.accounting import epsilon
from fedsim.session import forget_session, open_session


class Deployed(Rounds):
    """Rounds over desks; `owners` changes what some owners decide. `restart` begins all desks anew from what lies on their disks."""

    def __init__(self, config, folder, owners=None):
        super().__init__(config)
        owners = owners or {}
        self.owners = [replace(Owner(i, shard=True, folder=str(folder / str(i))), **owners.get(i, {})) for i in range(CLIENTS)]
        self.restart()
        self.grid = InProcessGrid(lambda message, context: self.desks[context.node_id - 1].answer(message), workers=CLIENTS)
        client_nodes = lambda clients: {client: client + 1 for client in clients}  # noqa: E731
        self.strategy = FedsimStrategy(self.session, config, self.ledger, self.state, client_nodes=client_nodes)

    def restart(self):
        self.desks = [Desk(owner) for owner in self.owners]

    def ask(self, client, kind, **request):
        message = Message(RecordDict({"request": ConfigRecord(request)}), client + 1, kind)
        return next(iter(self.grid.send_and_receive([message])))


def privately(**privacy):
    return of_method("fed_sb", privacy={"unit": PrivacyUnit.example, "noise_multiplier": 1.0, **privacy})


@pytest.mark.parametrize(
    "config",
    [
        of_method("fed_sb", training={"scaffold": True}, engine={"cohort_size": 1}),
        of_method("fedsa_lora", engine={"cohort_size": 1}),
        of_method("fed_sb", compression={"name": "top_k", "error_feedback": True}, engine={"cohort_size": 1}),
        of_method("flora", engine={"cohort_size": 1}),
    ],
    ids=["scaffold", "fedsa_lora", "error_feedback", "flora"],
)
def test_desks_that_start_anew_after_every_round_train_as_clients_of_one_process(config, tmp_path):
    plain = Rounds(config).next(3)
    factors = {name: tensor.clone() for name, tensor in plain.state.factors.items()}
    deployed = Deployed(config, tmp_path)
    for _ in range(3):
        deployed.next().restart()
    for name, tensor in deployed.state.factors.items():
        torch.testing.assert_close(tensor, factors[name], rtol=0, atol=1e-6)
    assert deployed.ledger.totals() == plain.ledger.totals()


def test_a_round_that_is_asked_for_again_gives_the_same_reply(tmp_path):
    config = of_method("fed_sb", training={"scaffold": True})
    deployed = Deployed(config, tmp_path).next()
    state = deployed.state
    before = {name: tensor.clone() for name, tensor in state.factors.items()}, state.control.clone(), dict(state.accepted)
    deployed.next()
    after = deployed.flat("R").clone()
    state.factors, state.control, state.accepted = before
    deployed.number = 1  # the server has lost the round and goes on from its checkpoint
    torch.testing.assert_close(deployed.next().flat("R"), after, rtol=0, atol=1e-7)


def test_a_client_says_who_it_is_and_how_much_it_has(tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path)
    reply = deployed.ask(2, JOIN, config=json.dumps(to_dict(of_method("fed_sb"))))
    member = Member.from_records(reply.content)
    assert (member.client, member.num_examples, member.shard) == (2, len(deployed.session.shards[2]), True)
    assert member.base_digest == deployed.session.base_digest


def test_a_client_trains_on_its_own_file_and_on_all_of_it(tmp_path):
    rows = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(10)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"shard": False, "data_path": str(tmp_path / "mine.jsonl"), "data_sets": ["gsm8k"]}
    deployed = Deployed(of_method("fed_sb"), tmp_path, {1: own})
    member = Member.from_records(deployed.ask(1, JOIN, config=json.dumps(to_dict(of_method("fed_sb")))).content)
    assert member.num_examples == 9  # a single file's tenth is held out
    deployed.next()
    assert dict(zip(deployed.strategy.facts.clients, deployed.strategy.facts.num_examples, strict=True))[1] == 9


@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        ({"max_local_steps": 1}, "2 local steps are more than the 1 accepted"),
        ({"methods": ["fedit"]}, "method.name=fed_sb is not among those accepted: fedit"),
        ({"min_privacy": "example"}, "privacy.unit=none is weaker than example"),
    ],
)
def test_what_an_owner_refuses_is_missing_with_its_reason_and_not_averaged(owner, reason, tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path, {1: owner}).next()
    (missing,) = deployed.strategy.facts.missing
    assert (missing.client, missing.reason) == (1, Reason.refused_by_client)
    assert reason in missing.detail
    assert sorted(deployed.strategy.facts.clients) == [0, 2]


def test_other_clients_and_other_configurations_are_refused(tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path)
    text = json.dumps(to_dict(of_method("fed_sb")))
    for request, reason in (
        ({"config": text, "clients": [0, 1]}, "names clients [0, 1], this is client 1"),
        ({"config": text.replace('"seed"', '"sed"'), "clients": [1]}, "is not one of fedsim"),
        ({"config": "no json", "clients": [1]}, "is not one of fedsim"),
        ({"config": text.replace('"clients": 3', '"clients": 0'), "clients": [1]}, "Expected federation.clients"),
        ({"config": text.replace('"network": "none"', '"network": "/etc/passwd"'), "clients": [1]}, "no message opens a file here"),
    ):
        error = deployed.ask(1, "train", **request).error
        assert error.code == REFUSED
        assert reason in error.reason


def test_a_clients_own_budget_ends_its_part_whatever_the_server_thinks(tmp_path):
    config = privately()
    plain = Deployed(config, tmp_path / "unlimited").next()
    spent = plain.desks[1]._budget._ledger.epsilon(1)
    deployed = Deployed(config, tmp_path / "limited", {1: {"max_epsilon": spent * 1.01}}).next()
    assert deployed.strategy.facts.missing == []
    deployed.restart()
    deployed.next()
    (missing,) = deployed.strategy.facts.missing
    assert (missing.client, missing.reason) == (1, Reason.refused_by_client)
    assert "epsilon would exceed the owner's" in missing.detail


def test_the_clients_accountant_agrees_with_the_servers_plan(tmp_path):
    deployed = Deployed(privately(), tmp_path).next(2)
    for client, desk in enumerate(deployed.desks):
        mechanism = deployed.session.privacy_plan[client].round_mechanism
        assert desk._budget._ledger.history(client) == (replace(mechanism, steps=2 * mechanism.steps),)


def test_an_initial_gradient_costs_the_rate_at_which_its_coins_fall(tmp_path):
    """A coin has 2^24 sides, so no rate is smaller than that of one side, whatever the server asks for."""
    config = privately()
    deployed = Deployed(config, tmp_path)
    request = {"config": json.dumps(to_dict(config)), "clients": [0], "round": 0, "digests": '{"W": ""}'}
    for rate in (1e-12, 1.5 * 2.0**-24, 0.5):
        assert not deployed.ask(0, INITIAL_GRADIENT, **request, samples=[0], noise=[1.0], rates=[rate]).has_error()
    assert [each.sampling_rate for each in deployed.desks[0]._budget._ledger.history(0)] == [2.0**-24, 2.0**-23, 0.5]


def test_training_without_noise_is_refused_where_the_configuration_promises_it(tmp_path):
    deployed = Deployed(privately(), tmp_path)
    error = deployed.ask(0, "train", config=json.dumps(to_dict(privately())), clients=[0], round=1).error
    assert error.code == REFUSED
    assert "train would leave without noise" in error.reason


@pytest.mark.parametrize(("noise", "least", "refused"), [(0.0, "example", True), (0.0, "none", False), (1.0, "example", False)])
def test_noise_of_zero_is_refused_where_the_owner_asks_for_privacy(noise, least, refused, tmp_path):
    deployed = Deployed(privately(), tmp_path, {0: {"min_privacy": least}})
    request = {"config": json.dumps(to_dict(privately())), "clients": [0], "round": 1, "noise": [noise], "clip_norm": 1.0}
    for kind, rest in (("train", {}), ("train.initial_gradient", {"samples": [2], "rates": [0.5]})):
        reply = deployed.ask(0, kind, **request, **rest)
        told = reply.error.reason if reply.has_error() else ""
        assert (f"{kind} would leave without the noise that min_privacy=example asks for" in told) == refused


def test_an_initial_gradient_is_refused_where_only_updates_are_private(tmp_path):
    config = of_method("fed_sb", privacy={"unit": PrivacyUnit.client, "noise_multiplier": 1.0}, federation={"weighting": Weighting.uniform})
    deployed = Deployed(config, tmp_path)
    request = {"config": json.dumps(to_dict(config)), "clients": [0], "samples": [2], "round": 0, "digests": '{"W": ""}'}
    error = deployed.ask(0, "train.initial_gradient", **request).error
    assert error.code == REFUSED
    assert "an initial gradient would leave as it is" in error.reason


def test_a_failure_tells_the_server_nothing_of_the_data(tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path, {0: {"shard": False, "data_path": str(tmp_path / "secret-name.jsonl")}})
    error = deployed.ask(0, "train", config=json.dumps(to_dict(of_method("fed_sb"))), clients=[0], round=1).error
    assert error.code != REFUSED
    assert "secret-name" not in error.reason
    assert "UserError" in error.reason


def own_rows(folder, count):
    """An owner's options for a file of so many rows."""
    lines = [json.dumps({"question": f"What is {n} plus 1?", "answer": f"{n + 1}\n#### {n + 1}"}) for n in range(count)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return {"shard": False, "data_path": str(folder / "mine.jsonl"), "data_sets": ["gsm8k"]}


def private_upload(folder, noise, round=1, **owner):
    """The change of R that client 1 sends, privately, in answer to one request, over a desk that starts anew."""
    config = privately(noise_multiplier=noise)
    deployed = Deployed(config, folder, {1: owner})
    start = deployed.flat("R")
    packer = deployed.strategy._packer()
    (ask,) = deployed.strategy.asking.to_train(round, packer, deployed.grid, [1])
    reply = deployed.desks[1].answer(ask.message)
    return from_record(record_of(reply.content.array_records, client_key(1)), len(start)) - start


def test_the_noise_of_a_client_is_not_that_of_the_seed_which_the_server_knows(tmp_path):
    config = privately(noise_multiplier=1.0)
    simulated = Rounds(config)
    start = simulated.flat("R")
    with_the_seeds_noise = train_clients(simulated.session, [1], 1, {}, noise=[1.0])[0].arrays["values"] - start
    found = private_upload(tmp_path, 1.0)
    gap = float((found - with_the_seeds_noise).norm())  # 0 with the same noise; the two share their step, so chance may make it small
    assert gap > 0.1 * float(found.norm()), "the server could take the noise off"


def test_a_request_that_is_asked_again_is_answered_with_the_same_noise_also_by_a_new_process(tmp_path):
    assert torch.equal(private_upload(tmp_path, 1.0), private_upload(tmp_path, 1.0))


def test_what_is_asked_again_when_its_answer_is_not_kept_any_more_has_other_noise(tmp_path):
    deployed = Deployed(privately(noise_multiplier=1.0), tmp_path)
    size = len(deployed.flat("R"))

    def answered(round):
        (ask,) = deployed.strategy.asking.to_train(round, deployed.strategy._packer(), deployed.grid, [1])
        deployed.restart()
        return from_record(record_of(deployed.desks[1].answer(ask.message).content.array_records, client_key(1)), size)

    first, second, again, twice = (answered(round) for round in (1, 2, 1, 1))
    assert torch.equal(again, twice)
    assert not torch.equal(first, again), "as a new run of the same configuration asks it"
    assert deployed.desks[1]._budget._ledger.history(1)[0].steps == 3 * deployed.session.privacy_plan[1].round_mechanism.steps
    assert not torch.equal(second, again)


def test_what_is_asked_again_is_not_computed_again_and_costs_nothing_more(tmp_path, monkeypatch):
    config = privately(noise_multiplier=1.0)
    once = open_session(config).privacy_plan[1]
    spent = epsilon([once.round_mechanism], once.delta)
    deployed = Deployed(config, tmp_path, {1: {"max_epsilon": 1.01 * spent}})
    (ask,) = deployed.strategy.asking.to_train(1, deployed.strategy._packer(), deployed.grid, [1])
    first = deployed.desks[1].answer(ask.message)
    deployed.restart()

    def otherwise(*arguments, **named):
        raise AssertionError("a GPU would not give the same bits")

    monkeypatch.setattr("fedsim.flower.worker.train_clients", otherwise)
    again = deployed.desks[1].answer(ask.message)
    start = deployed.flat("R")
    assert torch.equal(*(from_record(record_of(reply.content.array_records, client_key(1)), len(start)) for reply in (first, again)))
    assert repr(again.content.metric_records) == repr(first.content.metric_records)
    assert not again.content.config_records
    assert deployed.desks[1]._budget._ledger.history(1) == (deployed.session.privacy_plan[1].round_mechanism,)
    (other,) = deployed.strategy.asking.to_train(2, deployed.strategy._packer(), deployed.grid, [1])
    assert "epsilon would exceed" in deployed.desks[1].answer(other.message).error.reason, "what is not the same costs more"


def test_a_gradient_that_is_asked_again_is_the_same_whatever_factors_a_worker_that_began_anew_has_installed(tmp_path):
    options = {"privacy": {"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "init_noise_multiplier": 1.0}}
    config = of_method("fed_sb", **options, adapter={"init": Init.gradient_dp, "refresh_every": 1}, engine={"name": "deployment"})
    deployed = Deployed(config, tmp_path)
    packer = deployed.strategy._packer()
    (train,) = deployed.strategy.asking.to_train(1, packer, deployed.grid, [1])
    gradient = Message(deployed.strategy._gradient_request(1, packer, 1, 0), 2, INITIAL_GRADIENT, group_id="1")
    deployed.desks[1].answer(train.message)
    asked_twice = [deployed.desks[1].answer(gradient)]
    forget_session()
    deployed.restart()
    asked_twice.append(deployed.desks[1].answer(gradient))
    one, two = (reply.content.array_records[client_key(1)]["values"].numpy() for reply in asked_twice)
    assert (one == two).all()
    assert [each.steps for each in deployed.desks[1]._budget._ledger.history(1) if each.name == "initialization"] == [1]


def test_no_two_different_requests_are_answered_with_the_same_noise(tmp_path):
    """Twice the answer at noise 1 less that at noise 2 would be the noiseless step, were the noise the same but for its size."""
    one, two = private_upload(tmp_path, 1.0), private_upload(tmp_path, 2.0)
    assert float((2 * one - two).norm()) > float(one.norm())
    assert not torch.equal(one, private_upload(tmp_path, 1.0, round=2))


def test_other_data_is_never_answered_about_with_the_same_noise(tmp_path):
    first = private_upload(tmp_path, 5.0, **own_rows(tmp_path, 20))
    second = private_upload(tmp_path, 5.0, **own_rows(tmp_path, 21))  # the same file with a row more, the same key
    assert float((first - second).norm()) > 0.5 * float(first.norm()), "the difference would be what the new row adds"


@pytest.mark.parametrize(("promise", "owner"), [({"unit": PrivacyUnit.none}, {"min_privacy": "example"}), ({"noise_multiplier": 1.0}, {})])
def test_rows_of_an_owner_are_never_evaluated_on_where_privacy_is_promised(promise, owner, tmp_path):
    """The server chooses by its seed which rows are held out: exact answers about them would tell of every row."""
    own = own_rows(tmp_path, 10) | {"methods": []}
    config = of_method("fedsa_lora", privacy={"unit": PrivacyUnit.example, **promise})
    deployed = Deployed(config, tmp_path, {1: {**own, **owner}})
    request = {"config": json.dumps(to_dict(config)), "clients": [1], "round": 1}
    error = deployed.ask(1, "evaluate", **request).error
    assert error.code == REFUSED
    assert "test rows are the owner's" in error.reason or "weaker than example" in error.reason
    open_config = of_method("fedsa_lora")
    trusting = Deployed(open_config, tmp_path, {1: own}).next()
    answer, seen = trusting.desks[1].answer, []
    trusting.desks[1].answer = lambda message: seen.append(answer(message)) or seen[-1]
    assert trusting.strategy.personal_evaluation(1, trusting.grid), "without a promise the clients' own models are evaluated"
    named = {key.partition("/")[0] for key in seen[0].content.metric_records[METRICS]}
    assert named == set(trusting.session.data.test), "the names of tasks are the server's: none of the owner's leaves"


def test_rows_of_an_owner_who_sends_behind_masks_only_are_never_evaluated_on(tmp_path):
    own = own_rows(tmp_path, 10) | {"masked_only": True}
    config = of_method("fed_sb", privacy={"secure_aggregation": True})
    deployed = Deployed(config, tmp_path, {1: own})
    error = deployed.ask(1, "evaluate", config=json.dumps(to_dict(config)), clients=[1], round=1).error
    assert (error.code, "test rows are the owner's" in error.reason) == (REFUSED, True)


@pytest.mark.parametrize("secure", [False, True])
def test_an_upload_over_other_data_than_the_noise_was_planned_for_is_refused(secure, tmp_path):
    own = own_rows(tmp_path, 20)
    config = privately(secure_aggregation=secure)
    deployed = Deployed(config, tmp_path, {1: own})
    (missing,) = deployed.next().strategy.facts.missing
    assert (missing.client, missing.reason) == (1, Reason.refused_by_server)
    assert "for which the noise was planned, got 18" in missing.detail
    deployed = Deployed(config, tmp_path / "heard", {1: own})
    deployed.session.set_own_data_sizes({1: 18})
    assert not deployed.next().strategy.facts.missing
    deployed.session.set_own_data_sizes({})


@pytest.mark.parametrize(("noise", "refused"), [(0.0, True), (float("nan"), True), (-1.0, True), (1.0, False)])
def test_a_masked_upload_without_noise_is_refused_where_its_owner_asks_for_privacy(noise, refused, tmp_path):
    privacy = {"unit": PrivacyUnit.client, "secure_aggregation": True, "noise_multiplier": 1.0}
    config = of_method("fed_sb", privacy=privacy, federation={"weighting": Weighting.uniform})
    deployed = Deployed(config, tmp_path, {1: {"min_privacy": "client"}})
    text = json.dumps(to_dict(config))
    error = deployed.ask(1, "train", config=text, clients=[1], round=1, noise_multiplier=noise, contributors=3).error
    assert ("would leave without the noise" in error.reason) == refused


def test_what_a_client_keeps_is_for_its_owners_eyes_only(tmp_path):
    before = os.umask(0o022)
    try:
        Deployed(privately(), tmp_path).next()
    finally:
        os.umask(before)
    kept = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert any(path.name.endswith("-train.state") for path in kept)
    assert "privacy.json" in {path.name for path in kept}
    assert {oct(path.stat().st_mode & 0o777) for path in kept} == {"0o600"}

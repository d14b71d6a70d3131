"""Rounds with deployment workers, each with its own owner, memory and accountant; only the network is missing."""

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
    """Rounds over desks; `owners` overrides owner options by client. `restart` recreates all desks from their disks."""

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
def test_desks_restarted_after_every_round_train_like_clients_of_one_process(config, tmp_path):
    plain = Rounds(config).next(3)
    factors = {name: tensor.clone() for name, tensor in plain.state.factors.items()}
    deployed = Deployed(config, tmp_path)
    for _ in range(3):
        deployed.next().restart()
    for name, tensor in deployed.state.factors.items():
        torch.testing.assert_close(tensor, factors[name], rtol=0, atol=1e-6)
    assert deployed.ledger.totals() == plain.ledger.totals()


def test_a_repeated_round_gives_the_same_factors(tmp_path):
    config = of_method("fed_sb", training={"scaffold": True})
    deployed = Deployed(config, tmp_path).next()
    state = deployed.state
    before = {name: tensor.clone() for name, tensor in state.factors.items()}, state.control.clone(), dict(state.accepted)
    deployed.next()
    after = deployed.flat("R").clone()
    state.factors, state.control, state.accepted = before
    deployed.number = 1  # the server has lost the round and resumes from its checkpoint
    torch.testing.assert_close(deployed.next().flat("R"), after, rtol=0, atol=1e-7)


def test_a_joining_client_reports_its_identity_and_number_of_examples(tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path)
    reply = deployed.ask(2, JOIN, config=json.dumps(to_dict(of_method("fed_sb"))))
    member = Member.from_records(reply.content)
    assert (member.client, member.num_examples, member.shard) == (2, len(deployed.session.shards[2]), True)
    assert member.base_digest == deployed.session.base_digest


def test_a_client_trains_on_its_whole_file_except_the_held_out_tenth(tmp_path):
    rows = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(10)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"shard": False, "data_path": str(tmp_path / "mine.jsonl"), "data_sets": ["gsm8k"]}
    deployed = Deployed(of_method("fed_sb"), tmp_path, {1: own})
    member = Member.from_records(deployed.ask(1, JOIN, config=json.dumps(to_dict(of_method("fed_sb")))).content)
    assert member.num_examples == 9  # a tenth of a single file is held out
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
def test_a_client_whose_owner_refuses_is_missing_with_the_reason_and_not_averaged(owner, reason, tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path, {1: owner}).next()
    (missing,) = deployed.strategy.facts.missing
    assert (missing.client, missing.reason) == (1, Reason.refused_by_client)
    assert reason in missing.detail
    assert sorted(deployed.strategy.facts.clients) == [0, 2]


def test_requests_for_other_clients_or_with_invalid_configurations_are_refused(tmp_path):
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


def test_a_client_stops_at_its_owners_budget(tmp_path):
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


def test_a_clients_privacy_ledger_matches_the_servers_plan(tmp_path):
    deployed = Deployed(privately(), tmp_path).next(2)
    for client, desk in enumerate(deployed.desks):
        mechanism = deployed.session.privacy_plan[client].round_mechanism
        assert desk._budget._ledger.history(client) == (replace(mechanism, steps=2 * mechanism.steps),)


def test_an_initial_gradient_is_charged_at_the_rounded_up_sampling_rate(tmp_path):
    """Sampling coins have 2^24 sides, so rates are rounded up to multiples of 2^-24."""
    config = privately()
    deployed = Deployed(config, tmp_path)
    request = {"config": json.dumps(to_dict(config)), "clients": [0], "round": 0, "digests": '{"W": ""}'}
    for rate in (1e-12, 1.5 * 2.0**-24, 0.5):
        assert not deployed.ask(0, INITIAL_GRADIENT, **request, samples=[0], noise=[1.0], rates=[rate]).has_error()
    assert [each.sampling_rate for each in deployed.desks[0]._budget._ledger.history(0)] == [2.0**-24, 2.0**-23, 0.5]


def test_training_without_noise_is_refused_when_the_configuration_promises_privacy(tmp_path):
    deployed = Deployed(privately(), tmp_path)
    error = deployed.ask(0, "train", config=json.dumps(to_dict(privately())), clients=[0], round=1).error
    assert error.code == REFUSED
    assert "train would leave without noise" in error.reason


@pytest.mark.parametrize(("noise", "least", "refused"), [(0.0, "example", True), (0.0, "none", False), (1.0, "example", False)])
def test_zero_noise_is_refused_when_the_owner_requires_privacy(noise, least, refused, tmp_path):
    deployed = Deployed(privately(), tmp_path, {0: {"min_privacy": least}})
    request = {"config": json.dumps(to_dict(privately())), "clients": [0], "round": 1, "noise": [noise], "clip_norm": 1.0}
    for kind, rest in (("train", {}), ("train.initial_gradient", {"samples": [2], "rates": [0.5]})):
        reply = deployed.ask(0, kind, **request, **rest)
        reason = reply.error.reason if reply.has_error() else ""
        assert (f"{kind} would leave without the noise that min_privacy=example asks for" in reason) == refused


def test_an_initial_gradient_is_refused_when_only_updates_are_private(tmp_path):
    config = of_method("fed_sb", privacy={"unit": PrivacyUnit.client, "noise_multiplier": 1.0}, federation={"weighting": Weighting.uniform})
    deployed = Deployed(config, tmp_path)
    request = {"config": json.dumps(to_dict(config)), "clients": [0], "samples": [2], "round": 0, "digests": '{"W": ""}'}
    error = deployed.ask(0, "train.initial_gradient", **request).error
    assert error.code == REFUSED
    assert "an initial gradient would leave as it is" in error.reason


def test_an_error_does_not_reveal_the_data_path_to_the_server(tmp_path):
    deployed = Deployed(of_method("fed_sb"), tmp_path, {0: {"shard": False, "data_path": str(tmp_path / "secret-name.jsonl")}})
    error = deployed.ask(0, "train", config=json.dumps(to_dict(of_method("fed_sb"))), clients=[0], round=1).error
    assert error.code != REFUSED
    assert "secret-name" not in error.reason
    assert "UserError" in error.reason


def own_rows(folder, count):
    """Writes a file of `count` rows and returns the owner's options for it."""
    lines = [json.dumps({"question": f"What is {n} plus 1?", "answer": f"{n + 1}\n#### {n + 1}"}) for n in range(count)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return {"shard": False, "data_path": str(folder / "mine.jsonl"), "data_sets": ["gsm8k"]}


def private_upload(folder, noise, round=1, **owner):
    """Returns the private change of R that client 1 uploads for one request to a fresh desk."""
    config = privately(noise_multiplier=noise)
    deployed = Deployed(config, folder, {1: owner})
    start = deployed.flat("R")
    packer = deployed.strategy._packer()
    (ask,) = deployed.strategy.asking.to_train(round, packer, deployed.grid, [1])
    reply = deployed.desks[1].answer(ask.message)
    return from_record(record_of(reply.content.array_records, client_key(1)), len(start)) - start


def test_client_noise_does_not_come_from_the_seed_known_to_the_server(tmp_path):
    config = privately(noise_multiplier=1.0)
    simulated = Rounds(config)
    start = simulated.flat("R")
    with_the_seeds_noise = train_clients(simulated.session, [1], 1, {}, noise=[1.0])[0].arrays["values"] - start
    found = private_upload(tmp_path, 1.0)
    gap = float((found - with_the_seeds_noise).norm())  # 0 with the same noise; the step is the same, so the gap may be small
    assert gap > 0.1 * float(found.norm()), "the server could take the noise off"


def test_a_repeated_request_gets_the_same_noise_from_a_new_desk(tmp_path):
    assert torch.equal(private_upload(tmp_path, 1.0), private_upload(tmp_path, 1.0))


def test_a_repeated_request_whose_reply_is_no_longer_kept_gets_new_noise_and_is_charged(tmp_path):
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


def test_a_repeated_request_returns_the_kept_reply_at_no_privacy_cost(tmp_path, monkeypatch):
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


def test_a_repeated_gradient_request_to_a_restarted_worker_gives_the_same_gradient(tmp_path):
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


def test_different_requests_get_different_noise(tmp_path):
    """With the same noise at two scales, twice the reply at noise 1 minus the reply at noise 2 would be the noiseless step."""
    one, two = private_upload(tmp_path, 1.0), private_upload(tmp_path, 2.0)
    assert float((2 * one - two).norm()) > float(one.norm())
    assert not torch.equal(one, private_upload(tmp_path, 1.0, round=2))


def test_different_data_gets_different_noise(tmp_path):
    first = private_upload(tmp_path, 5.0, **own_rows(tmp_path, 20))
    second = private_upload(tmp_path, 5.0, **own_rows(tmp_path, 21))  # the same file with one more row, the same key
    assert float((first - second).norm()) > 0.5 * float(first.norm()), "the difference would be what the new row adds"


@pytest.mark.parametrize(("promise", "owner"), [({"unit": PrivacyUnit.none}, {"min_privacy": "example"}), ({"noise_multiplier": 1.0}, {})])
def test_owner_rows_are_not_evaluated_when_privacy_is_promised(promise, owner, tmp_path):
    """The server's seed chooses the held-out rows, so exact results on them could reveal any row."""
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


def test_rows_of_a_masked_only_owner_are_not_evaluated(tmp_path):
    own = own_rows(tmp_path, 10) | {"masked_only": True}
    config = of_method("fed_sb", privacy={"secure_aggregation": True})
    deployed = Deployed(config, tmp_path, {1: own})
    error = deployed.ask(1, "evaluate", config=json.dumps(to_dict(config)), clients=[1], round=1).error
    assert (error.code, "test rows are the owner's" in error.reason) == (REFUSED, True)


@pytest.mark.parametrize("secure", [False, True])
def test_an_upload_is_refused_when_its_data_size_differs_from_the_noise_plan(secure, tmp_path):
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
def test_a_masked_upload_without_noise_is_refused_when_its_owner_requires_privacy(noise, refused, tmp_path):
    privacy = {"unit": PrivacyUnit.client, "secure_aggregation": True, "noise_multiplier": 1.0}
    config = of_method("fed_sb", privacy=privacy, federation={"weighting": Weighting.uniform})
    deployed = Deployed(config, tmp_path, {1: {"min_privacy": "client"}})
    text = json.dumps(to_dict(config))
    error = deployed.ask(1, "train", config=text, clients=[1], round=1, noise_multiplier=noise, contributors=3).error
    assert ("would leave without the noise" in error.reason) == refused


def test_a_clients_state_files_are_readable_only_by_their_owner(tmp_path):
    before = os.umask(0o022)
    try:
        Deployed(privately(), tmp_path).next()
    finally:
        os.umask(before)
    kept = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert any(path.name.endswith("-train.state") for path in kept)
    assert "privacy.json" in {path.name for path in kept}
    assert {oct(path.stat().st_mode & 0o777) for path in kept} == {"0o600"}

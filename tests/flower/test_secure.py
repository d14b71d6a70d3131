"""Whole rounds of secure aggregation: they equal plain rounds, survive dropouts, and send only masked values and sums."""

import json
from copy import deepcopy
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
from flower.rounds import Rounds, changed, of_method
from flwr.app import ConfigRecord, Error, Message, RecordDict
from scipy import stats

from clients.app import app
from fedsim.choices import Init, PrivacyUnit
from fedsim.cli.compose import compose
from fedsim.core.dropout import Stage, vanishes
from fedsim.core.methods import METHODS
from fedsim.core.missing import Reason
from fedsim.core.secure_aggregation import Party
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower import secure_worker
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.records import arrays_to_record, serialized_bytes
from fedsim.flower.requests import REQUEST
from fedsim.flower.strategy import FedsimStrategy
from fedsim.flower.worker import handle
from fedsim.initial_gradient import client_gradient
from fedsim.local_round import train_clients
from fedsim.plain import to_dict
from fedsim.session import forget_session

LINEAR = [name for name, method in METHODS.items() if method.linear and not method.pooled]
BITS = 18
SECURE = {"privacy": {"secure_aggregation": True}, "secure": {"bits": BITS, "range": 8.0}}


class RecordingGrid(InProcessGrid):
    """Records every message through the Grid in both directions."""

    def __init__(self, client_app, workers=1):
        super().__init__(client_app, workers)
        self.requests, self.replies = [], []

    def _handle(self, message):
        self.requests.append((message.metadata.message_type, message.content))
        reply = super()._handle(message)
        if reply.has_content():
            self.replies.append((message.metadata.message_type, reply.content))
        return reply


def secure_rounds(config, workers=1):
    found = Rounds(config, workers=workers)
    found.grid = RecordingGrid(app, workers)
    return found


def largest_gap(one, other):
    return max(float((tensor - other.state.factors[name]).abs().max()) for name, tensor in one.state.factors.items())


def bound(counts, step, clients):
    """Bounds the rounding error of a weighted mean: below one step per client, divided by the sum of weights n / largest."""
    return len(clients) * step * max(counts) / sum(counts[client] for client in clients)


@pytest.mark.parametrize("method", LINEAR)
def test_a_secure_round_equals_a_plain_one_up_to_quantisation(method):
    plain, secure = Rounds(of_method(method)).next(), secure_rounds(of_method(method, **SECURE)).next()
    step = 8.0 / (2 ** (BITS - 1) - 1)
    limit = bound(plain.counts, step, range(3)) + 1e-6
    kinds = plain.session.method.uploaded(1)
    uploaded = [name for name in plain.state.factors if name.rpartition(".")[2] in kinds]
    if method == "fedsvd":  # B and A are refactored from the product, whose error is bounded by that of B
        for layer, dense in plain.change().items():
            rank_bound = limit * plain.session.spec.rank * 0.5 * float(plain.start[f"{layer}.A"].abs().max()) * 3
            assert float((dense - secure.change()[layer]).abs().max()) <= rank_bound
    else:
        assert max(float((plain.state.factors[name] - secure.state.factors[name]).abs().max()) for name in uploaded) <= limit
    assert any(not torch.equal(plain.start[name], plain.state.factors[name]) for name in uploaded), "nothing was trained"
    facts, plain_facts = secure.strategy.facts, plain.strategy.facts
    assert (facts.num_tokens, facts.clients, facts.weights) == (plain_facts.num_tokens, plain_facts.clients, plain_facts.weights)
    assert facts.mean_loss == pytest.approx(plain_facts.mean_loss, abs=1e-4)
    assert facts.secure["clipped"] == 0


def test_masked_uploads_are_uniform_and_uncorrelated_with_the_clients_values():
    config = changed(of_method("ffa_lora", **SECURE), adapter={"rank": 16, "target_modules": []})
    secure = secure_rounds(config).next()
    updates = {}
    for client in range(3):  # the upload of the plain protocol
        plain = Rounds(changed(config, privacy={"secure_aggregation": False}))
        plain.session.install_state(plain.state)
        kinds = plain.session.method.uploaded(1)
        start = plain.session.spec.pack(plain.state.factors, kinds)
        updates[client] = (train_clients(plain.session, [client], 1, {})[0].arrays["values"] - start).numpy()
    (reply,) = [content for kind, content in secure.grid.replies if kind == "train"]
    assert set(reply) == {"client-0", "client-1", "client-2"}, "no loss, no number of tokens of a single client"
    for client in range(3):
        sent = reply.array_records[f"client-{client}"]["masked"].numpy()
        assert stats.chisquare(np.bincount(sent.ravel(), minlength=256)).pvalue > 1e-4
        values = sent[: len(updates[client])].astype(np.int64) @ (256 ** np.arange(sent.shape[1]))
        assert abs(np.corrcoef(values, updates[client])[0, 1]) < 0.03
        for other in range(client):  # the difference of two uploads is uniform too
            theirs = reply.array_records[f"client-{other}"]["masked"].numpy()
            assert stats.chisquare(np.bincount((sent - theirs).ravel(), minlength=256)).pvalue > 1e-4
    floats = [array for _, content in secure.grid.replies for r in content.array_records.values() for array in r.values()]
    assert {array.dtype for array in floats} == {"uint8"}, "nothing that a client sends is a number of its own"


def test_a_client_whose_worker_fails_is_left_out_of_the_sum(monkeypatch):
    secure = secure_rounds(of_method("fed_sb", **SECURE), workers=3)

    def failing(message, context):
        reply = app(message, context)
        failed = message.metadata.dst_node_id == 2 and message.metadata.message_type == "train"
        return Message(Error(0, "out of memory"), reply_to=message) if failed else reply

    secure.grid._app = failing
    secure.next()
    facts = secure.strategy.facts
    assert facts.clients == [0, 2]
    assert [(each.client, each.reason, each.detail) for each in facts.missing] == [(1, Reason.died, "out of memory")]
    assert facts.secure["vanished"] == {"1": "upload"}
    expected = Rounds(of_method("fed_sb"))
    expected.session.install_state(expected.state)
    start = expected.flat("R")
    updates = {client: train_clients(expected.session, [client], 1, {})[0].arrays["values"] - start for client in (0, 2)}
    mean = sum(update * share for update, share in zip(updates.values(), expected.shares([0, 2]), strict=True))
    limit = bound(expected.counts, 8.0 / (2 ** (BITS - 1) - 1), [0, 2])
    torch.testing.assert_close(secure.flat("R") - start, mean.float(), rtol=0, atol=limit + 1e-6)


@pytest.mark.parametrize(
    ("kind", "spoilt"),
    [("query.secure_keys", "keys"), ("query.secure_shares", "sealed"), ("train", "masked"), ("query.secure_unmask", "shares")],
)
def test_a_malformed_reply_excludes_at_most_its_own_client(kind, spoilt):
    secure = secure_rounds(of_method("fed_sb", **SECURE), workers=3)

    def spoiling(message, context):
        reply = app(message, context)
        if message.metadata.dst_node_id == 2 and message.metadata.message_type == kind:
            (name,) = reply.content.array_records
            reply.content[name] = arrays_to_record({spoilt: torch.zeros(5, dtype=torch.uint8)})
        return reply

    secure.grid._app = spoiling
    secure.next()
    facts = secure.strategy.facts
    in_sum = kind == "query.secure_unmask"
    assert facts.clients == ([0, 1, 2] if in_sum else [0, 2])
    told = [(each.client, each.reason) for each in facts.missing]
    assert told == ([] if in_sum else [(1, Reason.refused_by_server)])


def test_workers_forget_their_secrets_and_use_new_keys_each_round():
    secure = secure_rounds(of_method("fed_sb", **SECURE), workers=2).next(2)
    assert not [name for context in secure.grid.contexts.values() for name in context.state if name.startswith("party")]
    kinds = [kind for kind, _ in secure.grid.requests]
    assert kinds[:8] == [k for k in ("query.secure_keys", "query.secure_shares", "train", "query.secure_unmask") for _ in range(2)]
    keys = [
        record["keys"].numpy().tobytes()
        for kind, content in secure.grid.replies
        if kind == "query.secure_keys"
        for record in content.array_records.values()
    ]
    assert len(set(keys)) == 2 * 3, "new keys in each round"


@pytest.mark.parametrize(("peers", "threshold"), [((), 1), ((1, 2), 2)])
def test_a_client_refuses_to_share_secrets_below_the_configured_threshold(peers, threshold):
    config = changed(of_method("fed_sb", **SECURE), secure={"threshold": 0.9})
    secure = secure_rounds(config)
    node = secure.grid.contexts[1]
    told = {"config": json.dumps(to_dict(config)), "clients": [0], "round": 1}
    handle(Message(RecordDict({"request": ConfigRecord(told)}), 1, "query.secure_keys"), node)
    keys = [Party(peer).public for peer in peers]
    record = arrays_to_record(
        {
            "peers": torch.tensor(peers, dtype=torch.int64),
            "keys": torch.frombuffer(bytearray(b"".join(a + b for a, b in keys)), dtype=torch.uint8).view(len(peers), 64)
            if peers
            else torch.zeros(0, 64, dtype=torch.uint8),
        }
    )
    asked = RecordDict({"request": ConfigRecord({**told, "thresholds": [threshold]}), "secure-0": record})
    with pytest.raises(
        ValueError, match=rf"a threshold of {3 if peers else 2} or more \(secure.threshold\), got {len(peers)} and {threshold}"
    ):
        handle(Message(asked, 1, "query.secure_shares"), node)


def test_a_second_sum_of_one_round_over_other_survivors_is_not_unmasked(monkeypatch):
    gone = []
    moments = lambda config, server_round, client, *rates: Stage.upload if client in gone else None  # noqa: E731
    monkeypatch.setattr("fedsim.core.dropout.vanishes", moments)
    secure = secure_rounds(of_method("fed_sb", **SECURE)).next()
    secure.number = 0  # like a server resumed from before the round
    secure.next()
    secure.number, gone[:] = 0, [1]
    with pytest.raises(ValueError, match="the survivors of the sum that client 0 has helped to unmask before, got others"):
        secure.next()
    secure.number = 1
    secure.next()
    assert secure.strategy.facts.clients == [0, 2], "another round is another matter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "Expected 'contributors' in the request"), ({"contributors": 3, "largest": 9}, "a round of secure aggregation under way")],
)
def test_a_worker_refuses_an_upload_request_without_the_stages_before_it(fields, message):
    secure = secure_rounds(of_method("fed_sb", **SECURE))
    request = secure.messages(1)[0]
    request.content.config_records[REQUEST].update(fields)
    with pytest.raises(ValueError, match=message):
        app(Message(RecordDict(dict(request.content)), metadata=request.metadata), secure.grid.contexts[1])


@pytest.mark.parametrize("dropped", [{}, {1: Stage.keys}, {1: Stage.shares}, {1: Stage.upload}, {1: Stage.unmasking}])
def test_a_secure_round_with_a_dropout_at_any_stage_equals_the_plain_round(monkeypatch, dropped):
    config = of_method("fedit", **SECURE)
    moments = lambda config, server_round, client, *rates: dropped.get(client) if server_round else None  # noqa: E731
    monkeypatch.setattr("fedsim.core.dropout.vanishes", moments)
    secure = secure_rounds(config).next()
    plain = Rounds(of_method("fedit")).next()  # the same dropouts; a plain round has no last stage
    survivors = [client for client in range(3) if dropped.get(client, Stage.unmasking) is Stage.unmasking]
    assert secure.strategy.facts.clients == plain.strategy.facts.clients == survivors
    assert secure.strategy.facts.secure["vanished"] == {str(client): stage.name for client, stage in dropped.items()}
    for rounds in (plain, secure):
        missing = [(each.client, each.reason) for each in rounds.strategy.facts.missing]
        assert missing == [(client, Reason.dropped_out) for client in range(3) if client not in survivors]
    limit = bound(plain.counts, 8.0 / (2 ** (BITS - 1) - 1), survivors)
    assert largest_gap(plain, secure) <= limit + 1e-6


@pytest.mark.parametrize("stage", list(Stage))
def test_a_round_below_the_threshold_changes_nothing_and_reports_the_reason(monkeypatch, stage):
    monkeypatch.setattr("fedsim.core.dropout.vanishes", lambda config, server_round, client, *rates: stage if client else None)
    secure = secure_rounds(of_method("fed_sb", **SECURE)).next()
    facts = secure.strategy.facts
    assert facts.clients == []
    assert f"round 1 needs 2 of 3 clients to the end, got 1 that sent their {stage.name}" in facts.secure["refused"]
    assert facts.secure["vanished"] == {"1": stage.name, "2": stage.name}
    missing = [(each.client, each.reason) for each in facts.missing]
    assert missing == ([] if stage is Stage.unmasking else [(1, Reason.dropped_out), (2, Reason.dropped_out)]), "client 0 was there"
    assert largest_gap(secure, Rounds(of_method("fed_sb"))) == 0


@pytest.mark.parametrize("spoilt", ["values", "loss"])
def test_a_diverged_client_is_left_out_of_the_sum(monkeypatch, spoilt):
    def diverging(*arguments, **named):
        replies = train_clients(*arguments, **named)
        if spoilt == "loss":
            return [replace(r, result=replace(r.result, loss=inf)) if r.result.client == 1 else r for r in replies]
        return [replace(r, arrays={"values": r.arrays["values"] * nan}) if r.result.client == 1 else r for r in replies]

    monkeypatch.setattr("fedsim.flower.worker.train_clients", diverging)
    secure = secure_rounds(of_method("fedit", **SECURE)).next()
    plain = Rounds(of_method("fedit")).next()  # refuses non-finite uploads
    assert secure.strategy.facts.clients == plain.strategy.facts.clients == [0, 2]
    assert largest_gap(plain, secure) <= bound(plain.counts, 8.0 / (2 ** (BITS - 1) - 1), [0, 2]) + 1e-6


def test_a_non_finite_initial_gradient_is_left_out_of_the_sum(monkeypatch):
    def gradients(session, client, *arguments):
        return client_gradient(session, client, *arguments) * (nan if client == 1 else 1)

    config = of_method("fed_sb", adapter={"init": Init.gradient}, **SECURE)
    whole = secure_rounds(config)
    expected = whole.strategy.initial_gradients(whole.grid)
    monkeypatch.setattr("fedsim.flower.worker.client_gradient", gradients)
    secure = secure_rounds(config)
    found = secure.strategy.initial_gradients(secure.grid)
    assert secure.strategy.facts.secure["vanished"] == {"1": "upload"}
    assert all(tensor.isfinite().all() and tensor.norm() > 0 for tensor in found.values())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_secure_round_in_which_all_clients_diverge_changes_nothing_and_suggests_a_fix():
    secure = secure_rounds(of_method("fed_sb", training={"learning_rate": 1e30}, **SECURE)).next()
    assert secure.strategy.facts.clients == []
    assert "got 0 that sent their upload" in secure.strategy.facts.secure["refused"]
    assert "a lower training.learning_rate helps" in secure.strategy.facts.secure["refused"]
    assert largest_gap(secure, Rounds(of_method("fed_sb"))) == 0


def test_a_round_without_clients_leaves_the_server_moments_unchanged(monkeypatch):
    gone = lambda config, server_round, client, *rates: Stage.upload if server_round == 2 else None  # noqa: E731
    monkeypatch.setattr("fedsim.core.dropout.vanishes", gone)
    for options in (SECURE, {}):
        rounds = secure_rounds(of_method("fed_sb", server={"optimizer": "fedavgm", "momentum": 0.9}, **options)).next()
        before, moments, versions = rounds.flat("R").clone(), deepcopy(rounds.state.moments), dict(rounds.state.exchange.versions)
        assert moments
        rounds.next()
        assert rounds.strategy.facts.clients == []
        assert torch.equal(rounds.flat("R"), before)
        assert {name: value.tolist() for name, value in moments.items()} == {n: v.tolist() for n, v in rounds.state.moments.items()}
        assert rounds.state.exchange.versions == versions


@pytest.mark.parametrize(("cohort_size", "workers", "neighbours"), [(1, 1, 0), (2, 2, 0), (0, 3, 0), (2, 2, 2)])
def test_the_result_does_not_depend_on_cohorts_workers_and_neighbours(cohort_size, workers, neighbours):
    options = {"federation": {"clients": 5}, "secure": {**SECURE["secure"], "neighbours": neighbours}, "engine": {}}
    config = of_method("lora_xs", privacy=SECURE["privacy"], **options)
    whole = secure_rounds(changed(config, secure={"neighbours": 0})).next()
    parts = secure_rounds(changed(config, engine={"cohort_size": cohort_size}), workers=workers).next()
    # training is equal to float tolerance, so a few entries may round differently
    assert largest_gap(whole, parts) <= bound(whole.counts, 8.0 / (2 ** (BITS - 1) - 1), whole.strategy.facts.clients)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_ledger_records_every_protocol_byte_per_client(dropout):
    config = of_method("fed_sb", federation={"clients": 6, "dropout": dropout}, **SECURE)
    secure = secure_rounds(config, workers=2).next(2)
    crossed = {}
    for direction, messages in (("downlink", secure.grid.requests), ("uplink", secure.grid.replies)):
        for _, content in messages:
            for name, record in content.array_records.items():
                if name.startswith(("client-", "secure-")):
                    key = (direction, int(name.rpartition("-")[2]), "adapter" if name.startswith("client-") else "secure_aggregation")
                    crossed[key] = crossed.get(key, 0) + serialized_bytes(record)
    for (direction, client, purpose), size in crossed.items():
        assert secure.moved("serialized_bytes", direction=direction, client=client, purpose=purpose) == size
    assert sum(crossed.values()) == sum(
        row["serialized_bytes"] for row in secure.ledger.rows() if row["purpose"] == "secure_aggregation" or row["direction"] == "uplink"
    )
    width = secure.strategy.facts.secure["modulus_bits"] // 8
    sizes = {row["payload_bytes"] for row in secure.ledger.rows() if row["purpose"] == "adapter" and row["direction"] == "uplink"}
    assert len(sizes) == 1
    assert 0 < sizes.pop() - width * secure.session.spec.num_parameters(("R",)) < 100  # the counters


def test_entries_beyond_the_range_are_clipped_and_counted_over_all_clients():
    config = of_method("fed_sb", privacy=SECURE["privacy"], secure={"range": 1e-3, "bits": 12})
    plain, secure = Rounds(changed(config, privacy={"secure_aggregation": False})), secure_rounds(config).next()
    plain.session.install_state(plain.state)
    start = plain.flat("R")
    updates = [train_clients(plain.session, [client], 1, {})[0].arrays["values"] - start for client in range(3)]
    assert secure.strategy.facts.secure["clipped"] == sum(int((update.abs() > 1e-3).sum()) for update in updates) > 0
    mean = sum(update.clamp(-1e-3, 1e-3) * share for update, share in zip(updates, plain.shares(range(3)), strict=True))
    torch.testing.assert_close(secure.flat("R") - start, mean.float(), rtol=0, atol=bound(plain.counts, 1e-3 / 2047, range(3)) + 1e-7)


@pytest.mark.parametrize("sketch", [False, True])
def test_masked_initial_gradients_sum_to_the_plain_sum(sketch):
    config = changed(of_method("fed_sb", **SECURE), adapter={"init": Init.gradient, "init_samples": 7, "sketch": sketch})
    sums = []
    for secure in (False, True):
        rounds = secure_rounds(changed(config, privacy={"secure_aggregation": secure}))
        strategy = FedsimStrategy(rounds.session, rounds.session.config, rounds.ledger, rounds.state)
        sums.append(rounds.session.gradient_parts.layout.pack(strategy.initial_gradients(rounds.grid)))
    plain, masked = sums
    assert float(plain.abs().max()) > 1e-3
    torch.testing.assert_close(masked, plain, rtol=0, atol=3 * 16.0 / (2**31 // 3) + 1e-6)
    assert {kind for kind, _ in rounds.grid.replies} == {
        "query.secure_keys",
        "query.secure_shares",
        "train.initial_gradient",
        "query.secure_unmask",
    }
    assert rounds.moved("payload_bytes", purpose="initial_gradient") > 3 * 4 * len(plain)


REFUSED = [
    (("method=flora",), "flora needs every client's own factors"),
    (("method=fedex_lora",), "fedex_lora needs every client's own factors"),
    (("method=flexlora",), "flexlora needs every client's own factors"),
    (("method=centralized",), "centralized sends nothing"),
    (("server.rule=median",), "compares single uploads, which are hidden"),
    (("compression.name=int8",), "do not compress"),
    (("method=ravan", "method.client_heads=2"), "an entry that few clients send would be seen"),
    (("training=sgd", "training.momentum=0", "training.scaffold=true"), "would travel unmasked"),
    (("federation.clients=1",), "the sum over one client is its upload"),
    (("secure.bits=24", "federation.clients=600"), "does not fit into 32 bits"),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSED)
def test_options_that_conflict_with_secure_aggregation_are_refused_with_the_reason(overrides, reason):
    with pytest.raises(UserError) as refused:
        effective(compose([*overrides, "privacy.secure_aggregation=true"]))
    assert reason in str(refused.value)


SMALL = (
    *("data.train_examples=60", "data.test_examples=2", "federation.clients=4", "federation.rounds=3", "training.batch_size=3"),
    *(
        "training.local_steps=1",
        "adapter.rank=4",
        "adapter.init_samples=8",
        "evaluation.max_new_tokens=2",
        "evaluation.tokens_per_pass=999",
    ),
    "adapter.target_modules=[layers.1.self_attn.q_proj]",
)


def events_of(folder, kind):
    return [event for line in (folder / "events.jsonl").read_text().splitlines() if (event := json.loads(line))["kind"] == kind]


def test_a_run_reports_its_secure_rounds_and_a_resumed_one_ends_the_same(tmp_path):
    options = [*SMALL, "privacy.secure_aggregation=true", "federation.dropout=0.3", "seed=3"]
    whole = run(compose([*options, f"run_dir={tmp_path / 'whole'}"]), quiet=True)
    rounds = events_of(tmp_path / "whole", "round")
    config = compose(options)
    gone = [[c for c in range(4) if vanishes(config, number, c)] for number in (1, 2, 3)]
    assert any(gone)
    for event, vanished in zip(rounds, gone, strict=True):
        if "refused" in event["secure"]:
            assert event["clients"] == []
            assert "secure.threshold" in event["secure"]["refused"]
        else:
            assert sorted(map(int, event["secure"]["vanished"])) == vanished
            assert event["secure"]["participants"] == 4
            assert event["train_loss"] > 0
    assert any(event["clients"] for event in rounds)
    assert events_of(tmp_path / "whole", "secure_gradients")[0]["clipped"] == 0
    assert not (tmp_path / "whole/diagnosis.png").exists()

    run(compose([*options, f"run_dir={tmp_path / 'part'}"]), quiet=True)
    (tmp_path / "part/summary.json").unlink()
    for path in (tmp_path / "part/checkpoints").glob("round_000[23]*"):
        path.unlink()
    resumed = run(compose([*options, f"run_dir={tmp_path / 'part'}", "resume=true"]), quiet=True)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert resumed["communication"] == whole["communication"]


def test_dropout_without_secure_aggregation_renormalises_the_weights():
    config = of_method("fed_sb", federation={"clients": 6, "dropout": 0.4})
    rounds = Rounds(config).next()
    gone = [client for client in range(6) if vanishes(config, 1, client)]
    assert gone
    assert rounds.strategy.facts.clients == [client for client in range(6) if client not in gone]
    assert sum(rounds.strategy.facts.shares) == pytest.approx(1)
    assert {row["client"] for row in rounds.ledger.rows() if row["direction"] == "uplink"} == set(rounds.strategy.facts.clients)


def test_a_plain_round_in_which_all_clients_drop_out_changes_nothing():
    rounds = Rounds(of_method("fed_sb", federation={"dropout": 0.999999})).next()
    assert rounds.strategy.facts.clients == []
    assert largest_gap(rounds, Rounds(of_method("fed_sb"))) == 0


def test_example_level_privacy_under_masks_equals_the_plain_private_round():
    options = {"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "epsilon": None}
    config = of_method("fed_sb", secure=SECURE["secure"])
    config = changed(config, privacy=options)
    plain = Rounds(config).next()
    secure = secure_rounds(changed(config, privacy={"secure_aggregation": True})).next()
    assert largest_gap(plain, secure) <= bound(plain.counts, 8.0 / (2 ** (BITS - 1) - 1), range(3)) + 1e-6
    assert np.isnan(secure.strategy.facts.mean_loss)
    assert secure.strategy.facts.num_tokens == 0


def test_masked_private_initial_gradients_are_not_clipped():
    privacy = {"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "epsilon": None, "init_noise_multiplier": 30.0}
    config = changed(of_method("fed_sb", **SECURE), adapter={"init": Init.gradient_dp, "init_samples": 7})
    sums = []
    for secure in (False, True):
        rounds = secure_rounds(changed(config, privacy={**privacy, "secure_aggregation": secure}))
        strategy = FedsimStrategy(rounds.session, rounds.session.config, rounds.ledger, rounds.state)
        sums.append(rounds.session.gradient_parts.layout.pack(strategy.initial_gradients(rounds.grid)))
    assert float(sums[0].abs().max()) > 100
    torch.testing.assert_close(*sums, rtol=0, atol=1e-4)
    assert strategy.facts.secure["clipped"] == 0


def test_a_client_refuses_an_upload_when_it_received_too_few_shares(monkeypatch):
    secure = secure_rounds(of_method("fed_sb", **SECURE))
    monkeypatch.setattr(secure_worker, "take_shares", lambda request, message, context: None)  # as if the server forwarded no shares
    with pytest.raises(ValueError, match="Expected shares of 2 of the group"):
        secure.next()


def test_a_worker_that_lacks_the_state_is_asked_again_and_the_result_is_unchanged():
    expected = secure_rounds(of_method("fed_sb", **SECURE)).next()
    secure = secure_rounds(changed(of_method("fed_sb", **SECURE), adapter={"init": Init.gradient}))
    for client in range(3):
        secure.state.exchange.sent(client, ("B", "A"))  # no message will carry them
    forget_session()  # as in a new worker process
    secure.strategy.exchange(1, secure.grid)
    assert [kind for kind, _ in secure.grid.requests].count("train") == 2
    assert largest_gap(expected, secure) == 0


def test_repeated_secure_rounds_give_the_same_result():
    config = replace(of_method("rolora", **SECURE), seed=5)
    assert largest_gap(secure_rounds(config).next(2), secure_rounds(config).next(2)) == 0

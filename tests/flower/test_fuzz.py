"""Malformed messages to every decoder: seeded mutations of valid ones are decoded within all bounds or refused.

The slow tier runs 10,000 mutations per decoder (2,000 in one test), the default tier fewer.
A mutation that leaves a message valid may be accepted.
"""

import copy
import dataclasses
import io
import json
import random

import numpy as np
import pytest
import torch
from faults import faulty, rebuilt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from rounds import of_method

from clients.app import app
from clients.framing import FrameError, read_message, read_records, write_message, write_records
from clients.memory import Budget
from clients.owner import Owner, load_owner
from fedsim import checkpoints
from fedsim.checkpoints import Checkpoint, DamagedError
from fedsim.choices import Init
from fedsim.config import Config, FederationConfig
from fedsim.config_check import check
from fedsim.core.adapters import base_weights
from fedsim.core.compression import CODECS
from fedsim.core.payload import digest
from fedsim.errors import UserError
from fedsim.flower import worker
from fedsim.flower.asking import Ask
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.reading import Reader, Upload
from fedsim.flower.records import arrays_from_record, arrays_to_record
from fedsim.flower.remote_progress import MARK, ProgressFollower
from fedsim.flower.roster import Member
from fedsim.flower.rounds import GradientRound
from fedsim.flower.secure import Protocol, SumRefused
from fedsim.flower.worker import EVALUATE, INITIAL_GRADIENT, NEEDS_STATE, handle
from fedsim.journal import Journal, verified
from fedsim.links import links_of
from fedsim.plain import from_text, to_dict
from fedsim.privacy.accounting import Mechanism

ODD = [0, -1, 1, 2**31, 2**63 - 1, -(2**63), 1.5, float("nan"), float("inf"), -0.0, "", "x", "0", "../../etc/passwd", "\x00", "{}", "[]"]
ODD += [
    b"",
    b"\x80\x04N.",
    [],
    [0],
    [-1],
    [1.5],
    ["R"],
    ["R", "R"],
    ["B", "A"],
    [0, 1, 2, 3],
    [2**62],
    True,
    "null",
    '{"W": ""}',
    "[" * 3000,
]


def counts(fast):
    return [pytest.param(fast, id="some"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


def mutated_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        how = rng.randrange(5)
        if how == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
        elif how == 2:
            del data[place : place + rng.choice((1, 4, 1000))]
        elif how == 3:
            data[place : place + 8] = rng.choice((b"\xff" * 8, bytes(8), b"(9,)(9,)", b"99999999", b"True    "))
        else:
            data = data[:place]
    return bytes(data)


def mutated_text(rng, text):
    if rng.random() < 0.1:
        return str(rng.choice(ODD))
    return mutated_bytes(rng, text.encode()).decode("latin-1")


def mutated_json(rng, value, depth=0):
    """Returns the value with one part replaced, removed or added."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        how = rng.randrange(6)
        if how == 0:
            del value[key]
        elif how == 1:
            value[str(rng.choice(ODD))] = value[key]
        else:
            value[key] = mutated_json(rng, value[key], depth + 1)
        return value
    plain = [odd for odd in ODD if not isinstance(odd, bytes)]
    return rng.choice(plain)


def mutated_record(rng, record):
    """Returns a metric or configuration record with one entry changed, removed or added."""
    content = dict(record)
    key = rng.choice(list(content))
    how = rng.randrange(5)
    try:
        if how == 0:
            del content[key]
        elif how == 1:
            content[str(rng.choice(ODD))[:30]] = content[key]
        elif isinstance(content[key], str) and how < 4:
            content[key] = mutated_text(rng, content[key])
        elif isinstance(content[key], list) and content[key] and how == 2:
            content[key] = [*content[key][1:], rng.choice([odd for odd in ODD if type(odd) is type(content[key][0])] or content[key])]
        else:
            content[key] = rng.choice(ODD)
        return type(record)(content)
    except (TypeError, ValueError, OverflowError):  # Flower's records refuse the value
        return record


def mutated_array(rng, array):
    fields = {"dtype": array.dtype, "shape": tuple(array.shape), "stype": array.stype, "data": array.data}
    key = rng.choice(list(fields))
    if key == "data":
        fields[key] = mutated_bytes(rng, fields[key])
    elif key == "shape":
        fields[key] = rng.choice(((), (0,), (-1,), (2**40,), (1, *fields[key]), (3, 3), tuple(side + 1 for side in fields[key])))
    else:
        fields[key] = rng.choice(("", "float64", "object", "int8", "pickle", "numpy.ndarray", "<f4"))
    return Array(**fields)


def mutated_content(rng, content):
    """Returns a message's content with one record changed, removed or added."""
    records = dict(content)
    name = rng.choice(list(records))
    record, how = records[name], rng.randrange(8)
    if how == 0:
        del records[name]
    elif how == 1:
        records[rng.choice(("client-0", "client-7", "client--1", "control-0", "adapter", "fold", "W", "request", "metrics", ""))] = record
    elif isinstance(record, ArrayRecord):
        arrays = dict(record)
        key = rng.choice(list(arrays))
        arrays[key if how < 7 else "other"] = mutated_array(rng, arrays[key])
        records[name] = ArrayRecord(arrays)
    else:
        records[name] = mutated_record(rng, record)
    return RecordDict(records)


@pytest.mark.parametrize("count", counts(300))
def test_mutated_replies_are_refused_or_read_within_bounds(count):
    run = faulty(of_method("fed_sb", federation={"clients": 3}, training={"scaffold": True}), {})
    ask, reply = _asked(run)
    reader = Reader(run.session, run.state, run.strategy._charges, 1)
    rng = random.Random(0)
    refused = 0
    for _ in range(count):
        bad = Message(mutated_content(rng, reply.content), metadata=reply.metadata)
        for found in reader.uploads(ask, bad):
            refused += not isinstance(found, Upload)
            if isinstance(found, Upload):
                assert found.flat.isfinite().all()
                assert 1 <= found.num_examples <= 1_000_000
                assert found.client == 0
    assert refused > count / 3


def _asked(run):
    """Returns a request to client 0 and its valid reply."""
    message = run.messages(1)[0]
    (reply,) = run.grid.send_and_receive([message])
    return Ask(message, (0,)), rebuilt(reply)


@pytest.mark.parametrize("method", ["fed_sb", "fedex_lora"])
@pytest.mark.parametrize("count", counts(150))
def test_mutated_train_requests_are_refused_or_train_known_clients(count, method, monkeypatch):
    run = faulty(of_method(method, federation={"clients": 3}), {})
    run.next()
    message = run.messages(2)[0]
    session = run.session
    valid = from_text(str(message.content.config_records["request"]["config"]))
    trained = []

    def opened(config):
        if config != valid:
            raise UserError("another experiment")
        return session

    monkeypatch.setattr(worker, "open_session", opened)
    monkeypatch.setattr(worker, "train_clients", lambda _session, *given, **options: trained.append(given) or [])
    rng = random.Random(1)
    digests, context = dict(session.digests), Context(1, 1, {}, RecordDict(), {})
    for _ in range(count):
        bad = Message(mutated_content(rng, message.content), metadata=message.metadata)
        try:
            handle(bad, context)
        except (ValueError, UserError):
            continue
        finally:
            session.digests = dict(digests)  # each request meets the same worker
    assert all(0 <= client < 3 for clients, *_ in trained for client in clients)
    assert len(trained) < count


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", counts(200))
def test_mutated_compressed_uploads_are_refused_or_decode_to_finite_values(count, name):
    codec, rng, refused = CODECS[name], random.Random(2), 0
    arrays = codec.encode(torch.randn(600, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1), 0.1)
    record, types = arrays_to_record(arrays), codec.shapes(600, 0.1)
    for _ in range(count):
        key = rng.choice(list(record))
        bad = ArrayRecord({**record, key: mutated_array(rng, record[key])})
        try:
            flat = codec.decode(arrays_from_record(bad, types), 600, 0.1)
        except ValueError:
            refused += 1
            continue
        assert flat.shape == (600,)
        assert flat.isfinite().all()
    assert 0 < refused < count


class Recorded(InProcessGrid):
    """Records requests and replies by message type and node."""

    def __init__(self, workers):
        super().__init__(app, workers)
        self.asked, self.replies = {}, {}

    def _handle(self, message):
        self.asked[message.metadata.message_type, message.metadata.dst_node_id] = message
        reply = super()._handle(message)
        self.replies[message.metadata.message_type, message.metadata.dst_node_id] = reply
        return reply


@pytest.mark.parametrize("count", counts(300))
def test_mutated_secure_aggregation_replies_are_refused_or_summed_within_bounds(count, monkeypatch):
    """Replays the replies of one round many times, each time with one of them mutated."""
    run = faulty(of_method("fed_sb", privacy={"secure_aggregation": True}, federation={"max_examples": 1000}), {})
    run.grid, run.strategy.asking.client_nodes, seen = Recorded(3), None, []
    carry_out = Protocol.carry_out

    def noted(protocol, wanted):
        seen.append((protocol, wanted, carry_out(protocol, wanted)))
        return seen[-1][-1]

    monkeypatch.setattr(Protocol, "carry_out", noted)
    run.next()
    ((protocol, wanted, expected),) = seen
    rng, results = random.Random(5), []
    for _ in range(count):
        target = rng.choice(list(run.grid.replies))
        reply = run.grid.replies[target]
        bad = Message(mutated_content(rng, reply.content), metadata=reply.metadata)

        def answers(asks, target=target, bad=bad):
            for ask in asks:
                place = ask.message.metadata.message_type, ask.message.metadata.dst_node_id
                yield ask, bad if place == target else run.grid.replies[place]

        try:
            found = carry_out(dataclasses.replace(protocol, ask=answers), wanted)
        except SumRefused:
            continue
        results.append(found)
        assert set(found.survivors) <= set(expected.survivors)
        assert all(1 <= found.num_examples[client] <= 1000 for client in found.survivors)
        if target[0] == "query.secure_unmask":
            np.testing.assert_array_equal(found.values, expected.values, "a changed share opens the same sum, or none")
    assert 0 < len(results) < count


SECRETLY = {"privacy": {"secure_aggregation": True}}
ASKED = {
    "query.secure_keys": of_method("fed_sb", **SECRETLY),
    "query.secure_shares": of_method("fed_sb", **SECRETLY),
    "query.secure_unmask": of_method("fed_sb", **SECRETLY),
    "train": of_method("fed_sb", **SECRETLY),
    INITIAL_GRADIENT: of_method("fed_sb", adapter={"init": Init.gradient}),
    EVALUATE: of_method("fedsa_lora", evaluation={"max_new_tokens": 1}),
}


@pytest.mark.parametrize("count", [pytest.param(60, id="some"), pytest.param(2_000, id="2000", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ASKED)
def test_mutated_requests_of_other_kinds_leave_the_base_weights_unchanged(kind, count, monkeypatch):
    """The worker refuses or answers, and its base weights never change."""
    run = faulty(ASKED[kind], {})
    run.grid, run.strategy.asking.client_nodes = Recorded(3), None
    if kind == INITIAL_GRADIENT:
        run.strategy.initial_gradients(run.grid)
    else:
        run.next()
    if kind == EVALUATE:
        run.strategy.personal_evaluation(1, run.grid)
    ((_, node), message) = next((key, message) for key, message in run.grid.asked.items() if key[0] == kind)
    session, rng, answered = run.session, random.Random(kind), 0
    valid = from_text(str(message.content.config_records["request"]["config"]))

    def opened(config):
        if config != valid:
            raise UserError("another experiment")
        return session

    monkeypatch.setattr(worker, "open_session", opened)
    digests, context, weights = dict(session.digests), run.grid.contexts[node], digest(base_weights(session.model))
    for _ in range(count):
        bad, own = Message(mutated_content(rng, message.content), metadata=message.metadata), copy.deepcopy(context)
        try:
            answered += NEEDS_STATE not in handle(bad, own).content
        except (ValueError, UserError, KeyError):
            continue
        finally:
            session.digests = dict(digests)
    assert answered < count
    assert digest(base_weights(session.model)) == weights


@pytest.mark.parametrize("count", counts(500))
def test_mutated_initial_gradients_are_refused_or_summed_to_finite_values(count):
    run = faulty(of_method("fed_sb", adapter={"init": Init.gradient}), {})
    run.grid, run.strategy.asking.client_nodes = Recorded(3), None
    run.strategy.initial_gradients(run.grid)
    (reply,) = (reply for (kind, node), reply in run.grid.replies.items() if kind == INITIAL_GRADIENT and node == 1)
    (asked,) = (message for (kind, node), message in run.grid.asked.items() if kind == INITIAL_GRADIENT and node == 1)
    clients = tuple(asked.content.config_records["request"]["clients"])
    rng, refused = random.Random(11), 0
    for _ in range(count):
        bad = Message(mutated_content(rng, reply.content), metadata=reply.metadata)
        round_ = GradientRound(run.session, run.strategy.asking, run.strategy._charges, 0, 1)
        round_.take(iter([(Ask(asked, clients), bad)]))
        refused += bool(round_.facts.missing)
        if not round_.facts.missing:
            assert all(part.isfinite().all() for part in round_.result().values())
    assert refused > count / 3


@pytest.mark.parametrize("count", counts(500))
def test_mutated_client_and_link_files_raise_only_one_line_user_errors(count, tmp_path):
    rng, owner = random.Random(12), Owner(0, folder=str(tmp_path))
    budget = Budget(tmp_path / "privacy.json", owner)
    budget.charge(Mechanism(1.0, 0.1, 5), 100)
    (tmp_path / "client.yaml").write_text("client: 0\nmethods: [fed_sb]\nmax_epsilon: 3\nmin_privacy: example\nshard: true\n")
    (tmp_path / "links.yaml").write_text("- {uplink: 1e6, downlink: 2e6, latency: 0.1}\n- {uplink: 3e6, downlink: 4e6, dropout: 0.2}\n")
    readers = {
        "privacy.json": lambda path: Budget(path, owner),
        "client.yaml": load_owner,
        "links.yaml": lambda path: links_of(Config(federation=FederationConfig(network=str(path))), 10),
    }
    for name, read in readers.items():
        content, refused = (tmp_path / name).read_bytes(), []
        path = tmp_path / f"bad-{name}"
        for _ in range(count):
            path.write_bytes(mutated_bytes(rng, content))
            try:
                read(path)
            except UserError as error:
                refused.append(str(error))
        assert len(refused) > count / 10, name
        assert not [text for text in refused if "\n" in text]


@pytest.mark.parametrize("count", counts(300))
def test_mutated_frames_are_refused_or_keep_their_arrays(count):
    """Frames between client app and worker, and stored records: a mutated frame is refused or its arrays are unchanged."""
    run = faulty(of_method("fed_sb", federation={"clients": 3}), {})
    ask, reply = _asked(run)
    for write, read, valid in ((write_message, read_message, reply), (write_records, read_records, ask.message.content)):
        buffer, rng, refused = io.BytesIO(), random.Random(6), 0
        write(buffer.write, valid)
        arrays = {name: bytes(array.data) for record in _records(valid) for name, array in record.items()}
        for _ in range(count):
            try:
                found = read(io.BytesIO(mutated_bytes(rng, buffer.getvalue())).read, 10**7)
            except (FrameError, EOFError):
                refused += 1
                continue
            assert {name: bytes(array.data) for record in _records(found) for name, array in record.items()} == arrays
        assert refused > count / 3


def _records(value):
    return (value.content if isinstance(value, Message) else value).array_records.values()


@pytest.mark.parametrize("count", counts(500))
def test_mutated_join_replies_are_refused_or_read_with_the_right_types(count):
    valid, rng, refused = Member(1, 20, "digest", "1", True), random.Random(7), 0
    kinds = {"client": int, "num_examples": int, "shard": bool}
    for _ in range(count):
        try:
            found = Member.from_records(mutated_content(rng, valid.to_records()))
        except ValueError:
            refused += 1
            continue
        assert all(type(getattr(found, name)) is kind for name, kind in kinds.items())
        assert found.num_examples >= 1
    assert 0 < refused < count


@pytest.mark.parametrize("count", counts(300))
def test_every_change_to_a_journal_is_found(count, tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in range(5):
        journal.append("asked", round=number, clients=[0, 1])
    journal.close()
    content, rng = path.read_bytes(), random.Random(8)
    for _ in range(count):
        bad = mutated_bytes(rng, content)
        path.write_bytes(bad)
        verdict = verified(path, {}, journal.head)
        assert bool(verdict.problems) == (bad != content)


@pytest.mark.parametrize("count", counts(500))
def test_mutated_progress_logs_raise_only_user_errors(count, capsys):
    lines = [["started", 3, [0, 3]], ["phase", "x"], ["round_started", 1, 2, {}], ["note", "y"], ["summary", {"a": 1}]]
    text, rng, shown_whole = "".join(f"{MARK}{json.dumps(line)}\n" for line in lines), random.Random(9), 0
    for _ in range(count):
        shown = ProgressFollower(quiet=True)
        try:
            shown.feed(mutated_text(rng, text))
        except UserError:
            continue
        finally:
            shown.close()
        assert shown.summary is None or isinstance(shown.summary, dict)
        shown_whole += shown.summary == {"a": 1}
    assert 0 < shown_whole < count


@pytest.mark.parametrize("count", counts(300))
def test_mutated_checkpoints_are_refused_or_load_unchanged(count, tmp_path):
    whole = Checkpoint(3, {"factor/R": torch.arange(12.0), "x": torch.zeros(2, 2, dtype=torch.bfloat16)}, {"ledger": {"columns": [[1, 2]]}})
    checkpoints.Store(tmp_path, 1).writing(whole)()
    (path,) = checkpoints.saved(tmp_path)
    content, rng, refused = path.read_bytes(), random.Random(3), 0
    for _ in range(count):
        bad = mutated_bytes(rng, content)
        path.write_bytes(bad)
        try:
            found = checkpoints.load(path)
        except DamagedError:
            refused += 1
            continue
        assert (found.round, found.state) == (whole.round, whole.state), "a changed byte that changes nothing, or a broken checksum"
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in whole.tensors.items())
    assert refused > count / 2


@pytest.mark.parametrize("count", counts(500))
def test_mutated_configurations_are_refused_or_survive_a_round_trip(count):
    rng, plain, refused = random.Random(4), to_dict(Config()), 0
    text = json.dumps(plain)
    for place in range(count):
        bad = json.dumps(mutated_json(rng, plain)) if place % 2 else mutated_text(rng, text)
        try:
            found = from_text(bad)
            check(found)
        except UserError:
            refused += 1
            continue
        assert isinstance(found, Config)
        assert from_text(json.dumps(to_dict(found))) == found, "what is accepted is a configuration in every part"
    assert 0 < refused < count


def test_unmutated_messages_are_valid(tmp_path):
    run = faulty(of_method("fed_sb", federation={"clients": 3}, training={"scaffold": True}), {})
    ask, reply = _asked(run)
    (found,) = Reader(run.session, run.state, run.strategy._charges, 1).uploads(ask, reply)
    assert isinstance(found, Upload)
    assert isinstance(reply.content["metrics"], MetricRecord)
    assert isinstance(ask.message.content["request"], ConfigRecord)
    assert from_text(json.dumps(to_dict(Config()))) == Config()
    assert np.isfinite(found.flat.numpy()).all()

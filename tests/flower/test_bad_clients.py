"""Replies of broken or malicious clients are refused with a reason, and the round uses only the others."""

import numpy as np
import pytest
import torch
from faults import faulty, rebuilt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from rounds import changed, of_method

from fedsim.choices import Init, OverNorm, PrivacyUnit, Weighting
from fedsim.core.missing import Reason
from fedsim.flower.records import to_record

CONFIG = of_method("fed_sb", federation={"clients": 4}, data={"train_examples": 32})


def values_of(reply):
    return reply.content.array_records["client-2"]["values"].numpy()


def with_values(change):
    return lambda reply: rebuilt(reply, client_2=ArrayRecord({"values": Array(change(values_of(reply).copy()))}))


def with_array(**fields):
    """Replaces fields of the array's record, so that they contradict its bytes."""

    def change(reply):
        array = Array(values_of(reply))
        values = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | fields
        return rebuilt(reply, client_2=ArrayRecord({"values": Array(**values)}))

    return change


def claim(**metrics):
    return lambda reply: rebuilt(reply, metrics=metrics)


def spoiled(value):
    def change(values):
        values[1] = value
        return values

    return with_values(change)


def from_node(node):
    def change(reply):
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    return change


def huge_head(reply):
    """NumPy's header claims 10^12 numbers; its reader would allocate the memory first."""
    data = Array(values_of(reply)).data.replace(b"(18,)", b"(1000000000000,)")
    return with_array(data=data)(reply)


BAD = {
    "a NaN": (spoiled(np.nan), "finite"),
    "an infinity": (spoiled(np.inf), "finite"),
    "another shape": (with_values(lambda values: values[:-1]), "float32 of shape"),
    "two dimensions": (with_values(lambda values: values.reshape(2, -1)), "float32 of shape"),
    "another type": (with_values(lambda values: values.astype(np.float64)), "float32 of shape"),
    "objects": (with_array(dtype="object"), "float32 of shape"),
    "another name": (lambda reply: rebuilt(reply, client_2=ArrayRecord({"weights": Array(values_of(reply))})), "one array named"),
    "two arrays": (lambda reply: rebuilt(reply, client_2=ArrayRecord({n: Array(values_of(reply)) for n in ("values", "x")})), "one array"),
    "another serialisation": (with_array(stype="pickle"), "float32 of shape"),
    "a pickle": (with_array(data=b"\x80\x04N."), "NumPy's format"),
    "too many bytes": (lambda reply: with_array(data=Array(values_of(reply)).data + bytes(10**6))(reply), "bytes of something else"),
    "too few bytes": (lambda reply: with_array(data=Array(values_of(reply)).data[:-4])(reply), "bytes of something else"),
    "a head that promises more": (huge_head, "bytes of something else"),
    "a record too many": (lambda reply: rebuilt(reply, client_3=reply.content.array_records["client-2"]), "arrays of the clients"),
    "a configuration": (lambda reply: rebuilt(reply, extra=ConfigRecord({"x": 1})), "arrays of the clients"),
    "no examples": (claim(num_examples=[0]), "1 to 1000000 examples"),
    "a negative number of examples": (claim(num_examples=[-5]), "1 to 1000000 examples"),
    "an absurd number of examples": (claim(num_examples=[10**12]), "1 to 1000000 examples"),
    "a fraction of an example": (claim(num_examples=[1.5]), "whole numbers"),
    "a negative number of tokens": (claim(num_tokens=[-1]), "number of tokens"),
    "a loss that is none": (claim(loss=[float("nan")]), "finite training loss"),
    "lists of different lengths": (claim(num_tokens=[1, 2]), "as many numbers as clients"),
    "no counts": (claim(num_examples=None), "whole numbers"),
    "another client": (claim(clients=[3]), "a reply for clients"),
    "a client twice": (claim(clients=[2, 2], num_examples=[1, 1], num_tokens=[1, 1], loss=[1.0, 1.0], within=[1, 1]), "for clients"),
    "an earlier round": (claim(round=0), "late or replayed"),
    "no round": (claim(round=None), "whole number"),
    "the name of another node": (from_node(4), "the node that was asked"),
    "an absurd norm": (spoiled(3e38), "server.max_update_norm"),
}


@pytest.fixture(scope="module")
def others():
    """Returns R after a round without client 2."""
    run = faulty(CONFIG, {(1, 2): "died"}).next()
    return run.flat("R")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_refused_with_its_reason_and_not_averaged(name, others):
    change, reason = BAD[name]
    run = faulty(CONFIG, {(1, 2): change}).next()
    (missing,) = run.strategy.facts.missing
    assert (missing.client, missing.reason) == (2, Reason.refused_by_server)
    assert reason in missing.detail
    assert torch.equal(run.flat("R"), others)


def test_a_bad_update_does_not_exclude_the_rest_of_its_cohort(others):
    run = faulty(CONFIG, {})
    run.grid.faults = {(1, 0): spoiled(np.nan)}
    run.strategy.asking.client_nodes = None
    run.strategy.asking.cohorts = lambda clients, grid: [(1, list(clients))]
    run.next()
    assert [each.client for each in run.strategy.facts.missing] == [2]
    torch.testing.assert_close(run.flat("R"), others, rtol=0, atol=1e-5)


def test_refused_bytes_are_charged_without_parameters():
    run = faulty(CONFIG, {(1, 2): with_array(data=bytes(5000))}).next()
    assert run.moved("serialized_bytes", client=2, direction="uplink") == 5000
    assert run.moved("parameters", client=2, direction="uplink") == 0


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"a NaN"}))
def test_all_array_bytes_of_a_refused_reply_are_charged(name):
    sent = []

    def noted(reply):
        sent.append(BAD[name][0](reply))
        return sent[-1]

    run = faulty(CONFIG, {(1, 2): noted}).next()
    (reply,) = sent
    size = sum(len(array.data) for record in reply.content.array_records.values() for array in record.values())
    charged = run.moved("serialized_bytes", client=2, direction="uplink")
    assert size > 0
    assert size <= charged < size + 1000, "with Flower's framing where the arrays were in order"


def test_an_update_of_a_client_that_the_reply_does_not_list_is_charged():
    none = {name: [] for name in ("clients", "num_examples", "num_tokens", "loss", "within")}
    run = faulty(CONFIG, {(1, 2): claim(**none)}).next()
    assert [(each.client, each.reason) for each in run.strategy.facts.missing] == [(2, Reason.dropped_out)]
    assert run.moved("serialized_bytes", client=2, direction="uplink") > 0


def test_the_control_variate_of_a_refused_update_is_charged():
    run = faulty(changed(CONFIG, training={"scaffold": True}), {(1, 2): spoiled(np.nan)}).next()
    mine = {"client": 2, "direction": "uplink", "purpose": "control"}
    assert run.moved("serialized_bytes", **mine) > 0
    assert run.moved("parameters", **mine) == 0


def test_a_client_whose_control_variate_exceeds_the_norm_bound_is_refused():
    config = changed(CONFIG, training={"scaffold": True})
    size = len(faulty(config, {}).flat("R"))
    run = faulty(config, {(1, 2): lambda reply: rebuilt(reply, control_2=to_record(torch.full((size,), 1e30)))}).next()
    (missing,) = run.strategy.facts.missing
    assert (missing.client, missing.reason) == (2, Reason.refused_by_server)
    assert "control variate of norm 1e+06 at most" in missing.detail
    assert float(run.state.control.norm()) < 1e6


def test_a_refused_initial_gradient_is_charged():
    config = changed(CONFIG, adapter={"init": Init.gradient, "init_samples": 8}, federation={"min_replies": 1})
    bad = RecordDict({"client-2": ArrayRecord({"values": Array("float32", (1,), "numpy.ndarray", bytes(5000))})})
    run = faulty(config, {(0, 2): lambda reply: Message(bad, metadata=reply.metadata)})
    run.strategy.initial_gradients(run.grid)
    mine = {"client": 2, "direction": "uplink", "purpose": "initial_gradient"}
    assert [each.client for each in run.strategy.facts.missing] == [2]
    assert (run.moved("serialized_bytes", **mine), run.moved("parameters", **mine)) == (5000, 0)


def test_an_update_above_the_norm_bound_is_refused():
    bounded = changed(CONFIG, server={"max_update_norm": 1e6, "over_norm": OverNorm.refuse}, federation={"min_replies": 1})
    run = faulty(bounded, {(1, 2): with_values(lambda values: values * 1e9)}).next()
    assert [each.client for each in run.strategy.facts.missing] == [2]


def test_an_update_above_the_norm_bound_is_scaled_down():
    free = faulty(CONFIG, {}).next()
    bounded = changed(CONFIG, server={"max_update_norm": 1e-3, "over_norm": OverNorm.clip}, federation={"min_replies": 1})
    run = faulty(bounded, {}).next()
    assert run.strategy.facts.num_clipped == 4
    start = run.spec.pack(run.spec.pick(run.start, ("R",)), ("R",))
    step = run.flat("R") - start
    assert float(step.norm()) <= 1e-3 * (1 + 1e-4) < float((free.flat("R") - start).norm())


@pytest.mark.parametrize("values", [{}, {(1, 2): with_values(lambda values: values * 1e9)}])
def test_client_level_privacy_bounds_updates_by_the_clip_norm_and_reports_no_excess(values):
    privacy = {"unit": PrivacyUnit.client, "noise_multiplier": 0.0, "clip_norm": 1e-3}
    private = changed(CONFIG, privacy=privacy, federation={"weighting": Weighting.uniform}, server={"max_update_norm": 1e-4})
    run = faulty(private, values).next()
    assert (run.strategy.facts.missing, run.strategy.facts.num_clipped) == ([], 0)
    step = run.flat("R") - run.spec.pack(run.spec.pick(run.start, ("R",)), ("R",))
    assert 1e-4 < float(step.norm()) <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize(("part", "missing"), [(1 - 1e-6, []), (1 + 1e-6, [2])])
def test_the_update_norm_bound_is_accurate_to_one_millionth(part, missing):
    run = faulty(
        changed(CONFIG, server={"max_update_norm": 1e4}), {(1, 2): with_values(lambda values: moved_by(values, 1e4 * part))}
    ).next()
    assert [each.client for each in run.strategy.facts.missing] == missing


def moved_by(values, norm):
    """Returns an update of the given norm (R starts at zero) whose random direction limits the effect of float32 rounding."""
    direction = np.random.default_rng(0).normal(size=values.shape)
    return (direction * (norm / np.linalg.norm(direction))).astype(np.float32)

"""Compressed uploads in whole rounds: what the server reads, what is charged, and what error feedback keeps at the clients."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from rounds import SCALING, Rounds, of_method

from fedsim.choices import Optimizer
from fedsim.config import CompressionConfig
from fedsim.core.compression import CODECS
from fedsim.local_round import train_clients
from fedsim.seeding import torch_generator

DENSITY = 0.2
RANKS = {"adapter": {"rank": None}, "federation": {"ranks": {3: 1.0, 2: 1.0, 1: 1.0}}}


def compressed(name, codec, feedback=False, **sections):
    compression = {"name": codec, "density": DENSITY, "error_feedback": feedback}
    return Rounds(of_method(name, compression=compression, **sections))


@contextmanager
def uncompressed(session):
    """The session as it would be without compression."""
    config = session.config
    session.config = replace(config, compression=CompressionConfig())
    try:
        yield
    finally:
        session.config = config


def updates_of(run, round_, clients):
    """What every client's upload would change: its trained entries less those of the start."""
    run.session.install_state(run.state)
    kinds = run.session.method.uploaded(round_)
    start = run.spec.pack(run.state.factors, kinds)
    with uncompressed(run.session):
        replies = train_clients(run.session, clients, round_, {})
    updates = {}
    for client, reply in zip(clients, replies, strict=True):
        positions = run.session.sent_positions(round_, client)
        updates[client] = reply.arrays["values"] - (start if positions is None else start[positions])
    return start, updates


def through(codec, update, round_, client):
    """What the server reads of an update."""
    arrays = CODECS[codec].encode(update, torch_generator(0, "compression", round_, client), DENSITY)
    return CODECS[codec].decode(arrays, len(update), DENSITY)


@pytest.mark.parametrize(
    ("method", "codec", "sections"),
    [*(("fed_sb", codec, {}) for codec in CODECS), ("fed_sb", "int8", RANKS), ("ravan", "top_k", {"method": {"client_heads": 1}})],
)
def test_the_new_factors_are_the_start_and_the_mean_of_what_was_decoded(method, codec, sections):
    run = compressed(method, codec, **sections)
    kinds = run.session.method.uploaded(1)
    for round_ in (1, 2):
        start, updates = updates_of(run, round_, [0, 1, 2])
        sums, weights = np.zeros(len(start)), np.zeros(len(start))
        for client, update in updates.items():
            decoded = through(codec, update, round_, client)
            assert (decoded - update).abs().max() > 0, "a codec without error would show nothing"
            positions = run.session.sent_positions(round_, client)
            places = slice(None) if positions is None else positions.numpy()
            sums[places] += run.counts[client] * decoded.double().numpy()
            weights[places] += run.counts[client]
        run.next()
        expected = start.double().numpy() + sums / np.where(weights, weights, 1)
        np.testing.assert_allclose(run.flat(*kinds).double().numpy(), expected, atol=1e-6)


def test_products_are_made_of_what_was_decoded():
    run = compressed("flora", "int8", **RANKS)
    start, updates = updates_of(run, 1, [0, 1, 2])
    run.next()
    expected = dict.fromkeys(run.spec.layers, 0)
    for client, share in enumerate(run.shares(range(3))):
        positions = run.session.sent_positions(1, client)
        positions = torch.arange(len(start)) if positions is None else positions
        flat = torch.zeros_like(start)
        flat[positions] = start[positions] + through("int8", updates[client], 1, client)
        own = run.spec.layout(("B", "A")).unpack(flat.double())
        expected = {layer: total + share * SCALING * own[f"{layer}.B"] @ own[f"{layer}.A"] for layer, total in expected.items()}
    for layer, change in run.change().items():
        assert expected[layer].abs().max() > 1e-4
        torch.testing.assert_close(change, expected[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_the_ledger_has_what_the_codec_says(codec):
    run = compressed("fed_sb", codec, **RANKS).next()
    for client in range(3):
        (row,) = (row for row in run.ledger.rows() if row["client"] == client and row["direction"] == "uplink")
        count = 2 * run.session.client_rank(client) ** 2
        assert (row["parameters"], row["raw_bytes"]) == (count, 4 * count)
        assert row["payload_bytes"] == CODECS[codec].num_bytes(count, DENSITY)
        assert row["payload_bytes"] < row["serialized_bytes"] < row["payload_bytes"] + 1500, "Flower's framing of one or two arrays"
    (row,) = (row for row in run.ledger.rows() if row["client"] == 0 and row["direction"] == "downlink")
    assert row["payload_bytes"] == row["raw_bytes"], "downlinks are not compressed"


@pytest.mark.parametrize("codec", ["top_k", "int4"])
def test_error_feedback_adds_what_was_lost_to_a_clients_next_upload(codec):
    taking_part = {1: [0, 1, 2], 2: [1, 2], 3: [0, 2]}
    run = compressed("fed_sb", codec, feedback=True, federation={"rounds": 3})
    run.strategy.asking.participants = taking_part.get
    residues = dict.fromkeys(range(3), torch.zeros(run.spec.num_parameters(("R",))))
    for round_, clients in taking_part.items():
        start, updates = updates_of(run, round_, clients)
        decoded = {}
        for client in clients:
            decoded[client] = through(codec, updates[client] + residues[client], round_, client)
            residues[client] = updates[client] + residues[client] - decoded[client]
        run.next()
        expected = start + sum(p * decoded[client] for p, client in zip(run.shares(clients), clients, strict=True))
        torch.testing.assert_close(run.flat("R"), expected, rtol=0, atol=1e-6)
        for client, residue in residues.items():
            torch.testing.assert_close(run.kept(client)["residue"], residue, rtol=0, atol=1e-7)
            assert residue.any()


def test_without_error_feedback_clients_keep_nothing():
    assert not compressed("fed_sb", "top_k").next().grid.contexts[1].state.array_records


def test_a_personal_b_and_residues_of_a_lie_side_by_side():
    run = compressed("fedsa_lora", "top_k", feedback=True).next(2)
    sizes = {name: len(array) for name, array in run.kept(0).items()}
    assert sizes == {"personal": run.spec.num_parameters(("B",)), "residue": run.spec.num_parameters(("A",))}


@pytest.mark.parametrize(("codec", "feedback"), [("int8", False), ("top_k", True)])
def test_compressed_training_learns(codec, feedback):
    adamw = {"optimizer": Optimizer.adamw, "learning_rate": 0.03, "local_epochs": 1}  # so that a round's loss is over all examples
    run = compressed("fed_sb", codec, feedback, training=adamw, adapter={"target_modules": [], "rank": 8}, federation={"rounds": 4})
    losses = [run.next().strategy.facts.mean_loss for _ in range(4)]
    assert losses[3] < losses[1] < losses[0]
    assert losses[3] < 0.92 * losses[0], losses

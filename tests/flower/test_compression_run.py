"""Compressed uploads in whole rounds: decoded updates, charges, and the residues that clients keep for error feedback."""

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
    """Disables compression in the session."""
    config = session.config
    session.config = replace(config, compression=CompressionConfig())
    try:
        yield
    finally:
        session.config = config


def updates_of(run, round_, clients):
    """Returns the start, and each client's uncompressed update: its trained entries minus the start."""
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


def decoded_update(codec, update, round_, client):
    """Returns the update as the server decodes it."""
    arrays = CODECS[codec].encode(update, torch_generator(0, "compression", round_, client), DENSITY)
    return CODECS[codec].decode(arrays, len(update), DENSITY)


@pytest.mark.parametrize(
    ("method", "codec", "sections"),
    [*(("fed_sb", codec, {}) for codec in CODECS), ("fed_sb", "int8", RANKS), ("ravan", "top_k", {"method": {"client_heads": 1}})],
)
def test_new_factors_are_the_start_plus_the_mean_of_the_decoded_updates(method, codec, sections):
    run = compressed(method, codec, **sections)
    kinds = run.session.method.uploaded(1)
    for round_ in (1, 2):
        start, updates = updates_of(run, round_, [0, 1, 2])
        sums, weights = np.zeros(len(start)), np.zeros(len(start))
        for client, update in updates.items():
            decoded = decoded_update(codec, update, round_, client)
            assert (decoded - update).abs().max() > 0, "a codec without error would show nothing"
            positions = run.session.sent_positions(round_, client)
            entries = slice(None) if positions is None else positions.numpy()
            sums[entries] += run.counts[client] * decoded.double().numpy()
            weights[entries] += run.counts[client]
        run.next()
        expected = start.double().numpy() + sums / np.where(weights, weights, 1)
        np.testing.assert_allclose(run.flat(*kinds).double().numpy(), expected, atol=1e-6)


def test_flora_averages_products_of_the_decoded_factors():
    run = compressed("flora", "int8", **RANKS)
    start, updates = updates_of(run, 1, [0, 1, 2])
    run.next()
    expected = dict.fromkeys(run.spec.layers, 0)
    for client, share in enumerate(run.shares(range(3))):
        positions = run.session.sent_positions(1, client)
        positions = torch.arange(len(start)) if positions is None else positions
        flat = torch.zeros_like(start)
        flat[positions] = start[positions] + decoded_update("int8", updates[client], 1, client)
        own = run.spec.layout(("B", "A")).unpack(flat.double())
        expected = {layer: total + share * SCALING * own[f"{layer}.B"] @ own[f"{layer}.A"] for layer, total in expected.items()}
    for layer, change in run.change().items():
        assert expected[layer].abs().max() > 1e-4
        torch.testing.assert_close(change, expected[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_the_ledger_records_the_payload_bytes_of_the_codec(codec):
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
def test_error_feedback_adds_the_lost_residue_to_a_clients_next_upload(codec):
    cohorts = {1: [0, 1, 2], 2: [1, 2], 3: [0, 2]}
    run = compressed("fed_sb", codec, feedback=True, federation={"rounds": 3})
    run.strategy.asking.participants = cohorts.get
    residues = dict.fromkeys(range(3), torch.zeros(run.spec.num_parameters(("R",))))
    for round_, clients in cohorts.items():
        start, updates = updates_of(run, round_, clients)
        decoded = {}
        for client in clients:
            decoded[client] = decoded_update(codec, updates[client] + residues[client], round_, client)
            residues[client] = updates[client] + residues[client] - decoded[client]
        run.next()
        expected = start + sum(p * decoded[client] for p, client in zip(run.shares(clients), clients, strict=True))
        torch.testing.assert_close(run.flat("R"), expected, rtol=0, atol=1e-6)
        for client, residue in residues.items():
            torch.testing.assert_close(run.kept(client)["residue"], residue, rtol=0, atol=1e-7)
            assert residue.any()


def test_clients_keep_no_state_without_error_feedback():
    assert not compressed("fed_sb", "top_k").next().grid.contexts[1].state.array_records


def test_a_client_keeps_both_its_personal_b_and_its_residue_of_a():
    run = compressed("fedsa_lora", "top_k", feedback=True).next(2)
    sizes = {name: len(array) for name, array in run.kept(0).items()}
    assert sizes == {"personal": run.spec.num_parameters(("B",)), "residue": run.spec.num_parameters(("A",))}


@pytest.mark.parametrize(("codec", "feedback"), [("int8", False), ("top_k", True)])
def test_compressed_training_learns(codec, feedback):
    adamw = {"optimizer": Optimizer.adamw, "learning_rate": 0.03, "local_epochs": 1}  # one epoch: a round's loss covers all examples
    run = compressed("fed_sb", codec, feedback, training=adamw, adapter={"target_modules": [], "rank": 8}, federation={"rounds": 4})
    losses = [run.next().strategy.facts.mean_loss for _ in range(4)]
    assert losses[3] < losses[1] < losses[0]
    assert losses[3] < 0.92 * losses[0], losses

"""The strategy and the worker over the in-process Grid, compared with clients trained one by one and averaged as dense updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import Strategy

from clients.app import app
from fedsim.choices import Init, Weighting
from fedsim.config import AdapterConfig, Config, DataConfig, EngineConfig, FederationConfig, TrainingConfig
from fedsim.core.adapters import adapted_layers
from fedsim.core.communication import CommunicationLedger
from fedsim.core.initialization import from_seed
from fedsim.core.participation import gradient_samples
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.strategy import FedsimStrategy
from fedsim.initial_gradient import factors_from_gradients
from fedsim.local_round import train_clients
from fedsim.session import forget_session, open_session

SMALL = Config(
    adapter=AdapterConfig(rank=4, init=Init.orthogonal, init_samples=7),
    data=DataConfig(train_examples=30, test_examples=4),
    federation=FederationConfig(clients=5, rounds=2, quantity_sigma=0.7),
    training=TrainingConfig(batch_size=2, local_steps=2),
)


def opened(config=SMALL):
    """Returns a session, a global state on seeded bases (whatever adapter.init is), a strategy and an empty ledger."""
    session, ledger = open_session(config), CommunicationLedger()
    state = session.initial_state(from_seed(session.spec, {}, config.seed))
    return session, state, FedsimStrategy(session, config, ledger, state), ledger


def exchange(config, round_=1, workers=1):
    """Returns the flat R after a round."""
    session, state, strategy, _ = opened(config)
    strategy.exchange(round_, InProcessGrid(app, workers))
    return session.spec.pack(state.factors, ("R",))


def dense_update(session, flat, state):
    """Returns the weight updates s B R A of all layers as one vector."""
    factors = state.factors | session.spec.layout(("R",)).unpack(flat)
    return torch.cat([session.spec.update(factors, layer).flatten() for layer in session.spec.layers])


@pytest.mark.parametrize("weighting", Weighting)
def test_the_aggregate_equals_the_mean_of_the_clients_weight_updates(weighting):
    config = replace(SMALL, federation=replace(SMALL.federation, weighting=weighting))
    session, state, strategy, _ = opened(config)
    session.install_state(state)
    results = [train_clients(session, [client], 1, {})[0].result for client in range(5)]
    counts = [len(shard) for shard in session.shards]
    assert len(set(counts)) > 1, "equal shards would not tell the weightings apart"
    weights = torch.tensor(counts if weighting is Weighting.examples else [1] * 5, dtype=torch.float64)
    updates = torch.stack([dense_update(session, result.factors, state) for result in results]).double()
    expected = (weights / weights.sum()) @ updates
    strategy.exchange(1, InProcessGrid(app))
    aggregate = dense_update(session, session.spec.pack(state.factors, ("R",)), state)
    assert (updates[0] - expected).abs().max() > 1e-4, "clients that do not differ would show nothing"
    torch.testing.assert_close(aggregate.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("cohort_size", "workers"), [(1, 1), (2, 1), (0, 3)])
def test_the_result_does_not_depend_on_cohorts_or_workers(cohort_size, workers):
    whole = exchange(SMALL)
    parts = exchange(replace(SMALL, engine=EngineConfig(cohort_size=cohort_size)), workers=workers)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)
    assert not torch.equal(whole, torch.zeros_like(whole))


def test_participants_are_drawn_from_seed_and_round_only():
    config = replace(SMALL, federation=replace(SMALL.federation, fraction=0.4))
    _, _, strategy, _ = opened(config)
    rounds = [strategy.participants(r) for r in range(1, 40)]
    assert all(len(set(clients)) == 2 and clients == sorted(clients) for clients in rounds)
    assert {client for clients in rounds for client in clients} == set(range(5))
    assert rounds == [opened(config)[2].participants(r) for r in range(1, 40)]
    strategy.exchange(1, InProcessGrid(app))
    assert sorted(strategy.facts.clients) == rounds[0]
    other = opened(replace(config, seed=1))[2]
    assert rounds != [other.participants(r) for r in range(1, 40)]


def test_derived_bases_cost_nothing_and_the_adapter_is_charged_in_both_directions():
    session, _, strategy, ledger = opened()
    strategy.exchange(1, InProcessGrid(app))
    totals, count = ledger.totals(), 5 * 4 * 4 * len(adapted_layers(session.model))
    assert totals["setup_bytes"] == 0
    assert totals["uplink_parameters"] == totals["downlink_parameters"] == count
    assert totals["uplink_raw_bytes"] == 4 * count
    for direction in ("uplink", "downlink"):
        assert 4 * count < totals[f"{direction}_bytes"] < 4 * count + 5 * 1000, "float32 and Flower's framing"


def test_bases_from_data_are_charged_once_per_client():
    config = replace(SMALL, adapter=replace(SMALL.adapter, init=Init.gradient))
    session, state, strategy, ledger = opened(config)
    state.factors = factors_from_gradients(session, strategy.initial_gradients(InProcessGrid(app)))
    layers = adapted_layers(session.model).values()
    dense = sum(layer.B.shape[0] * layer.A.shape[1] for layer in layers)
    bases = sum(layer.B.numel() + layer.A.numel() for layer in layers)
    strategy.exchange(1, InProcessGrid(app))
    assert ledger.totals()["setup_parameters"] == 5 * dense + 5 * bases
    strategy.exchange(2, InProcessGrid(app))
    assert ledger.totals()["setup_parameters"] == 5 * dense + 5 * bases


def test_sketched_gradients_cost_less_and_keep_the_leading_directions():
    found = {}
    for sketch in (False, True):
        session, _, strategy, ledger = opened(replace(SMALL, adapter=replace(SMALL.adapter, init=Init.gradient, sketch=sketch)))
        parts = strategy.initial_gradients(InProcessGrid(app))
        found[sketch] = {layer: session.gradient_parts.whole(parts, layer).double() for layer in session.spec.layers}
        assert ledger.totals()["setup_parameters"] == 5 * session.gradient_parts.layout.num_parameters
    assert session.gradient_parts.layout.num_parameters < 0.2 * sum(gradient.numel() for gradient in found[False].values())
    captured = []
    for layer, gradient in found[False].items():
        left, _, right = torch.linalg.svd(found[True][layer])
        most = torch.linalg.svdvals(gradient)[:4].norm()
        captured.append(float((left[:, :4].T @ gradient @ right[:4].T).norm() / most))
    assert np.mean(captured) > 0.9


def test_initialisation_samples_are_split_evenly_and_completely():
    for samples, clients in [(7, 5), (3, 5), (5, 5), (100, 5)]:
        config = replace(SMALL, adapter=replace(SMALL.adapter, init_samples=samples))
        shares = gradient_samples(config)
        assert sum(shares.values()) == samples
        assert len(shares) == min(samples, clients)
        assert max(shares.values()) - min(shares.values()) <= 1


def test_resending_bases_to_a_worker_that_lost_them_is_not_charged():
    config = replace(SMALL, adapter=replace(SMALL.adapter, init=Init.gradient))
    expected = exchange(SMALL)
    session, state, strategy, ledger = opened(config)
    for client in range(5):
        state.exchange.sent(client, ("B", "A"))  # no message will carry them
    forget_session()  # as in a new worker process
    strategy.exchange(1, InProcessGrid(app))
    torch.testing.assert_close(session.spec.pack(state.factors, ("R",)), expected)
    assert ledger.totals()["setup_bytes"] == 0, "what a process lacks is no cost of the method"


def test_factors_that_do_not_match_their_digest_are_refused():
    _, state, strategy, _ = opened()
    state._digests[("R", 0)] = "0" * 64
    with pytest.raises(ValueError, match="Expected R with digest 0000"):
        strategy.exchange(1, InProcessGrid(app))


def test_the_strategy_lacks_flowers_own_loop_which_would_not_charge_clients():
    _, _, strategy, _ = opened()
    assert not isinstance(strategy, Strategy)
    assert not {"start", "configure_train", "aggregate_train"} & set(dir(strategy))


def test_round_shares_and_mean_loss_are_weighted_by_examples():
    session, _, strategy, _ = opened()
    strategy.exchange(1, InProcessGrid(app))
    facts = strategy.facts
    counts = np.array([len(session.shards[client]) for client in facts.clients])
    np.testing.assert_allclose(facts.shares, counts / counts.sum())
    np.testing.assert_allclose(facts.mean_loss, np.average(facts.loss, weights=counts))

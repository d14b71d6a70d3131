"""The strategy and the worker over the in-process Grid, against clients that are trained one by one and averaged as dense updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.app import app
from fedsim.config import AdapterConfig, Config, DataConfig, EngineConfig, FederationConfig, Init, TrainingConfig, Weighting
from fedsim.core.adapters import adapted_layers
from fedsim.core.communication import CommunicationLedger
from fedsim.core.initialization import bases_of, from_seed
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.records import from_record, to_record
from fedsim.flower.strategy import FedsimStrategy
from fedsim.session import _open, open_session

SMALL = Config(
    adapter=AdapterConfig(rank=4, init=Init.orthogonal, init_samples=7),
    data=DataConfig(train_examples=30, test_examples=4),
    federation=FederationConfig(clients=5, rounds=2, quantity_sigma=0.7),
    training=TrainingConfig(batch_size=2, local_steps=2),
)


def opened(config=SMALL, has_bases=frozenset()):
    """A session with installed bases (seeded ones, whatever the configuration says), a strategy and an empty ledger."""
    session, ledger = open_session(config), CommunicationLedger()
    adapter = from_seed(adapted_layers(session.model), config.seed)
    session.install_bases(bases_of(adapter))
    start = session.layout.pack({name: adapter[name] for name in session.layout.names})
    derived = config.adapter.init in (Init.orthogonal, Init.weight_svd)
    bases = None if derived else session.bases_layout.pack(bases_of(adapter))
    return session, FedsimStrategy(session, config, ledger, bases, set(has_bases)), start, ledger


def exchange(config, round_=1, workers=1):
    session, strategy, start, _ = opened(config)
    record = strategy.exchange(round_, to_record(start), InProcessGrid(app, workers))
    return from_record(record, session.layout.num_parameters)


def dense_update(session, flat):
    """The weight update s B R A of every layer as one vector."""
    session.install_factors(flat)
    return torch.cat([(layer.scaling * layer.B @ layer.R @ layer.A).flatten() for layer in adapted_layers(session.model).values()])


@pytest.mark.parametrize("weighting", Weighting)
def test_the_aggregate_is_the_mean_of_the_clients_weight_updates(weighting):
    config = replace(SMALL, federation=replace(SMALL.federation, weighting=weighting))
    session, strategy, start, _ = opened(config)
    alone = [session.train(start, [client], 1)[0] for client in range(5)]
    counts = [len(shard) for shard in session.shards]
    assert len(set(counts)) > 1, "equal shards would not tell the weightings apart"
    weights = torch.tensor(counts if weighting is Weighting.examples else [1] * 5, dtype=torch.float64)
    updates = torch.stack([dense_update(session, result.factors.flatten()) for result in alone]).double()
    expected = (weights / weights.sum()) @ updates
    record = strategy.exchange(1, to_record(start), InProcessGrid(app))
    aggregate = dense_update(session, from_record(record, session.layout.num_parameters))
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
    _, strategy, start, _ = opened(config)
    rounds = [strategy.participants(r) for r in range(1, 40)]
    assert all(len(set(clients)) == 2 and clients == sorted(clients) for clients in rounds)
    assert {client for clients in rounds for client in clients} == set(range(5))
    assert rounds == [opened(config)[1].participants(r) for r in range(1, 40)]
    strategy.exchange(1, to_record(start), InProcessGrid(app))
    assert sorted(strategy.facts.clients) == rounds[0]
    other = opened(replace(config, seed=1))[1]
    assert rounds != [other.participants(r) for r in range(1, 40)]


def test_bases_that_clients_derive_cost_nothing_and_the_adapter_is_charged_both_ways():
    session, strategy, start, ledger = opened()
    strategy.exchange(1, to_record(start), InProcessGrid(app))
    totals, count = ledger.totals(), 5 * 4 * 4 * len(adapted_layers(session.model))
    assert totals["setup_bytes"] == 0
    assert totals["uplink_parameters"] == totals["downlink_parameters"] == count
    assert totals["uplink_raw_bytes"] == 4 * count
    for direction in ("uplink", "downlink"):
        assert 4 * count < totals[f"{direction}_bytes"] < 4 * count + 5 * 1000, "float32 and Flower's framing"


def test_bases_from_data_are_charged_once_to_each_client():
    config = replace(SMALL, adapter=replace(SMALL.adapter, init=Init.gradient))
    session, ledger = open_session(config), CommunicationLedger()
    adapter = session.bases_from_gradients(FedsimStrategy(session, config, ledger, None, set()).initial_gradients(InProcessGrid(app)))
    session.install_bases(bases_of(adapter))
    strategy = FedsimStrategy(session, config, ledger, session.bases_layout.pack(bases_of(adapter)), set())
    layers = adapted_layers(session.model).values()
    dense = sum(layer.B.shape[0] * layer.A.shape[1] for layer in layers)
    bases = sum(layer.B.numel() + layer.A.numel() for layer in layers)
    start = session.layout.pack({name: adapter[name] for name in session.layout.names})
    first = strategy.exchange(1, to_record(start), InProcessGrid(app))
    assert ledger.totals()["setup_parameters"] == 5 * dense + 5 * bases
    strategy.exchange(2, first, InProcessGrid(app))
    assert ledger.totals()["setup_parameters"] == 5 * dense + 5 * bases


def test_the_shares_of_the_initialisation_samples_add_up():
    for samples, clients in [(7, 5), (3, 5), (5, 5), (100, 5)]:
        config = replace(SMALL, adapter=replace(SMALL.adapter, init_samples=samples))
        shares = opened(config)[1].init_shares()
        assert sum(shares.values()) == samples
        assert len(shares) == min(samples, clients)
        assert max(shares.values()) - min(shares.values()) <= 1


def test_a_worker_that_lacks_the_bases_asks_for_them_once():
    config = replace(SMALL, adapter=replace(SMALL.adapter, init=Init.gradient))
    _, strategy, start, _ = opened(config, has_bases=set(range(5)))
    expected = exchange(SMALL)
    _open.cache_clear()  # as a worker process that has just been started
    record = strategy.exchange(1, to_record(start), InProcessGrid(app))
    torch.testing.assert_close(from_record(record, len(expected)), expected)


def test_bases_that_do_not_fit_the_digest_are_refused():
    session, strategy, start, _ = opened()
    session.bases_digest = "0" * 64
    message = next(iter(strategy.configure_train(1, to_record(start), None, InProcessGrid(app))))
    session.bases_digest = ""
    with pytest.raises(ValueError, match="Expected bases with digest 0000"):
        list(InProcessGrid(app).send_and_receive([message]))


def test_facts_of_a_round_are_averages_by_examples():
    session, strategy, start, _ = opened()
    strategy.exchange(1, to_record(start), InProcessGrid(app))
    facts = strategy.facts
    counts = np.array([len(session.shards[client]) for client in facts.clients])
    np.testing.assert_allclose(facts.shares, counts / counts.sum())
    np.testing.assert_allclose(facts.mean_loss, np.average(facts.loss, weights=counts))

"""Simulated drop-outs depend on seed, round and client only."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fedsim.config import Config, FederationConfig, PrivacyConfig
from fedsim.core.dropout import Stage, attendance, responding, vanishes
from fedsim.core.secure_aggregation import neighbour_graph


def config_of(dropout, secure=False):
    return Config(federation=FederationConfig(dropout=dropout), privacy=PrivacyConfig(secure_aggregation=secure))


def test_clients_drop_out_at_the_configured_rate_and_equally_often_at_every_stage():
    moments = [vanishes(config_of(0.3, secure=True), 1, client) for client in range(4000)]
    before = [moment for moment in moments if moment is not None and moment <= Stage.upload]
    assert len(before) / 4000 == pytest.approx(0.3, abs=0.03)
    assert moments.count(Stage.unmasking) / (4000 - len(before)) == pytest.approx(0.3, abs=0.03)
    assert all(before.count(stage) / len(before) == pytest.approx(1 / 3, abs=0.05) for stage in (Stage.keys, Stage.shares, Stage.upload))


def test_the_same_clients_are_lost_with_and_without_secure_aggregation():
    clients = list(range(300))
    plain, secure = (responding(config_of(0.2, secure), 4, clients) for secure in (False, True))
    assert plain == secure
    assert plain != responding(config_of(0.2), 5, clients)
    assert plain != responding(replace(config_of(0.2), seed=1), 4, clients)
    assert responding(config_of(0.0), 4, clients) == responding(config_of(0.9), 0, clients) == clients


def test_attendance_only_shrinks_and_ends_below_the_threshold():
    graph = neighbour_graph(list(range(30)), 0, 0, 1)
    assert attendance(config_of(0.9, secure=True), 0, graph) == {stage: list(range(30)) for stage in Stage}
    few = list(attendance(config_of(0.1, secure=True), 1, graph).values())
    assert all(set(later) <= set(earlier) for earlier, later in pairwise(few))
    assert 18 <= len(few[-1]) < 30
    many = attendance(config_of(0.6, secure=True), 1, graph)
    *enough, last = (len(heard_) for heard_ in many.values())
    assert len(enough) == 2
    assert min(enough) >= 18 > last

import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedsim.core.aggregation import weighted_mean


def test_weighted_mean_equals_flowers_average_by_number_of_examples():
    updates = [torch.randn(1000) for _ in range(3)]
    weights = [5.0, 1.0, 12.0]
    records = [
        RecordDict({"a": ArrayRecord({"x": Array(update.numpy())}), "m": MetricRecord({"num_examples": weight})})
        for weight, update in zip(weights, updates, strict=True)
    ]
    oracle = torch.from_numpy(aggregate_arrayrecords(records, "num_examples")["x"].numpy())
    torch.testing.assert_close(weighted_mean(zip(weights, updates, strict=True)), oracle.float(), rtol=1e-6, atol=1e-7)


def test_fed_sb_aggregate_equals_mean_of_weight_deltas():
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.linalg.qr(torch.randn(n, 6, generator=generator)).Q for n in (20, 30))
    Rs, weights = [torch.randn(6, 6, generator=generator) for _ in range(4)], [1.0, 7.0, 2.0, 3.0]
    mean_of_deltas = sum(w * B.double() @ R.double() @ A.T.double() for w, R in zip(weights, Rs, strict=True)) / sum(weights)
    R = weighted_mean(zip(weights, Rs, strict=True))
    assert (B @ R @ A.T - mean_of_deltas).abs().max() < 1e-6


def test_order_of_arrival_does_not_show():
    updates = [(float(n), torch.randn(1000)) for n in range(1, 26)]
    assert torch.equal(weighted_mean(updates), weighted_mean(reversed(updates)))


def test_no_client_is_an_error():
    with pytest.raises(ValueError, match="at least one client"):
        weighted_mean([])

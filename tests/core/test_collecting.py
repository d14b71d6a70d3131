import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedsim.config import MethodConfig
from fedsim.core.collecting import Collector, WeightedMean
from fedsim.core.forms import LORA, AdapterSpec


def weighted_mean(updates):
    pairs = list(updates)
    mean = WeightedMean(pairs[0][1].numel())
    for weight, update in pairs:
        mean.add(weight, update.flatten())
    return mean.result(torch.zeros(1)).view(pairs[0][1].shape)


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


def test_the_weighted_mean_does_not_depend_on_the_order_of_arrival():
    updates = [(float(n), torch.randn(1000)) for n in range(1, 26)]
    assert torch.equal(weighted_mean(updates), weighted_mean(reversed(updates)))


def test_an_entry_is_averaged_over_the_clients_that_sent_it_and_unsent_entries_keep_their_value():
    mean = WeightedMean(4)
    mean.add(1.0, torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    mean.add(3.0, torch.tensor([6.0]), torch.tensor([1]))
    mean.add(2.0, torch.tensor([9.0]), torch.tensor([2]))
    assert mean.result(torch.full((4,), 7.0)).tolist() == [1.0, 5.0, 9.0, 7.0]


def test_a_mean_over_no_clients_raises_an_error():
    with pytest.raises(ValueError, match="at least one client"):
        WeightedMean(3).result(torch.zeros(3))


def test_a_client_with_zeros_in_all_layers_or_in_the_first_does_not_stop_the_round():
    spec = AdapterSpec(LORA, {"one": (6, 8), "two": (6, 8)}, 4)
    start = {f"{layer}.{kind}": torch.zeros(shape) for layer in spec.layers for kind, shape in spec.shapes(layer).items()}
    for layers, rank in (((), 1), (("two",), 3)):
        client = {name: tensor.clone() for name, tensor in start.items()}
        for layer in layers:
            client[f"{layer}.A"][:3], client[f"{layer}.B"][:, :3] = 1.0, 1.0
        collector = Collector(spec, ("B", "A"), start, spec.pack(start, ("B", "A")), MethodConfig(), keep_products=False, keep_clients=True)
        layout = spec.layout(("B", "A"))
        collector.add(1.0, layout.pack(client), torch.arange(layout.num_parameters))
        found = collector.collected(layout.pack(start), 0, 1)
        torch.testing.assert_close(found.product("two"), spec.update(client, "two"))
        assert found.clients[0]["two.A"].shape[0] == rank

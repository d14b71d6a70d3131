import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedsim.flower.grid import InProcessGrid


def adding_app() -> ClientApp:
    """Returns an app that adds its node id to every array in place, and counts its calls in its Context."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        calls = context.state.metric_records.setdefault("calls", MetricRecord({"n": 0}))
        calls["n"] += 1
        arrays = message.content["arrays"]
        for name in list(arrays):
            arrays[name] = Array(arrays[name].numpy() + context.node_id)
        metrics = MetricRecord({"num-examples": context.node_id, "calls": calls["n"]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def test_flowers_own_fedavg_runs_on_the_grid():
    grid = InProcessGrid(adding_app(), workers=3)
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord({"x": Array(np.zeros(2, np.float32))}), num_rounds=2)
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6  # each node adds its id, which is also its number of examples
    np.testing.assert_allclose(result.arrays["x"].numpy(), 2 * mean, rtol=1e-6)
    assert result.train_metrics_clientapp[2]["calls"] == pytest.approx(2)  # a node's Context persists between rounds


def messages(grid, content, count):
    return [Message(content, node, "train") for node in list(grid.get_node_ids())[:count]]


def test_a_nodes_in_place_change_does_not_reach_other_nodes_or_the_server():
    grid = InProcessGrid(adding_app(), workers=2)
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(1, np.float32))}), "config": ConfigRecord({})})
    replies = list(grid.send_and_receive(messages(grid, content, 2)))
    assert [float(reply.content["arrays"]["x"].numpy()[0]) for reply in replies] == [1.0, 2.0]
    assert content["arrays"]["x"].numpy()[0] == 0.0


def test_replies_name_their_request_and_are_pulled_one_at_a_time():
    grid = InProcessGrid(adding_app(), workers=2)
    content = RecordDict({"arrays": ArrayRecord()})
    ids = list(grid.push_messages(messages(grid, content, 2)))
    first, second, nothing = (list(grid.pull_messages(ids)) for _ in range(3))
    assert [reply.metadata.reply_to_message_id for reply in first + second] == ids
    assert nothing == []


def test_messages_are_created_lazily():
    grid, made = InProcessGrid(adding_app(), workers=2), []

    def lazy_messages():
        for message in messages(grid, RecordDict({"arrays": ArrayRecord()}), 2):
            made.append(message)
            yield message

    replies = iter(grid.send_and_receive(lazy_messages()))
    next(replies)
    assert len(made) == 1


def test_an_exception_of_a_client_app_propagates():
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise FloatingPointError("broken")

    grid = InProcessGrid(app)
    with pytest.raises(FloatingPointError, match="broken"):
        list(grid.send_and_receive([Message(RecordDict(), 1, "train")]))

"""How a worker handles messages and client memory, independent of the transport."""

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from rounds import Rounds, of_method

from fedsim.choices import Optimizer
from fedsim.core.adapters import merged
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.records import arrays_to_record
from fedsim.flower.requests import METRICS
from fedsim.flower.worker import handle, memory_key, read_memory, write_memory
from fedsim.training.evaluation import evaluate


def context():
    return Context(1, 1, {}, RecordDict(), {})


def client_state(value):
    """Returns a state to keep for client 3."""
    return {3: {"control": torch.full((2,), float(value))}}


def kept(context, accepted):
    found = read_memory(context, [3], {3: accepted})[3]
    return float(found["control"][0]) if found else None


def test_an_unknown_message_type_is_refused_by_name():
    InProcessGrid(lambda message, context: message)  # Flower must know the run before a Message can be created
    with pytest.raises(ValueError, match=r"one of the types train, train\.initial_gradient, evaluate.*'query\.nothing'"):
        handle(Message(RecordDict(), 1, "query.nothing"), context())


def test_a_repeated_round_replaces_its_state_and_keeps_the_last_accepted_one():
    node = context()
    write_memory(node, client_state(1), 1, {})
    write_memory(node, client_state(2), 2, {3: 1})
    write_memory(node, client_state(4), 4, {3: 2})  # the client was not drawn in round 3
    assert [kept(node, number) for number in (4, 2)] == [4.0, 2.0]
    write_memory(node, client_state(40), 4, {3: 2})
    assert (kept(node, 4), kept(node, 2)) == (40.0, 2.0)


def test_a_train_reply_has_only_the_metrics_that_the_server_uses():
    run = Rounds(of_method("fed_sb"))
    (message,) = messages_of(run)
    reported = set(handle(message, context()).content["metrics"])
    assert reported == {"round", "clients", "num_examples", "num_tokens", "loss", "within"}


def test_client_state_of_a_lost_round_is_deleted():
    node = context()
    write_memory(node, client_state(1), 1, {})
    write_memory(node, client_state(2), 2, {3: 1})  # its upload is lost
    write_memory(node, client_state(3), 3, {3: 1})  # its upload is lost too
    assert set(node.state) == {memory_key(3, 1), memory_key(3, 3)}


def test_a_new_run_finds_no_client_state_of_an_earlier_run():
    node = context()
    write_memory(node, client_state(5), 5, {})
    assert kept(node, 0) is None
    write_memory(node, client_state(1), 1, {})
    assert set(node.state) == {memory_key(3, 1)}


def test_only_the_last_two_rounds_are_kept_and_other_records_stay():
    node = context()
    node.state[memory_key(30, 7)] = arrays_to_record({"control": torch.zeros(1)})
    node.state["other"] = ArrayRecord()
    for number in range(1, 6):
        write_memory(node, client_state(number), number, {3: number - 1})
    assert set(node.state) == {memory_key(3, 4), memory_key(3, 5), memory_key(30, 7), "other"}


def test_clients_with_their_own_node_are_asked_only_there():
    run = Rounds(of_method("fed_sb", training={"optimizer": Optimizer.sgd}), workers=4)
    nodes = {0: 4, 1: 2, 2: 1}
    run.strategy.asking.client_nodes = lambda clients: {
        client: nodes[client] for client in clients if client != 1
    }  # client 1 is not connected
    asked = [(message.metadata.dst_node_id, list(message.content["request"]["clients"])) for message in messages_of(run)]
    assert asked == [(4, [0]), (1, [2])]


def messages_of(run):
    run.session.install_state(run.state)
    return run.messages(1)


@pytest.mark.parametrize("max_length", [36, 512])
def test_personal_evaluation_sums_to_one_evaluation_over_all_questions(max_length):
    """With the short max_length, some clients have no question with reference tokens left and do not count in the mean loss."""
    rounds = Rounds(of_method("fedsa_lora", data={"train_examples": 24, "test_examples": 8, "max_length": max_length}))
    session = rounds.session
    found = rounds.strategy.personal_evaluation(0, rounds.grid)
    for task, questions in session.data.test.items():
        with merged(session.model):
            whole = evaluate(session.model, session.tokenizer, questions, session.config.evaluation, session.config.data)
        reported = found[task]
        assert (reported["num_examples"], reported["num_losses"]) == (len(questions), whole.num_losses)
        assert reported["accuracy"] == pytest.approx(whole.accuracy)
        assert reported["loss"] == pytest.approx(whole.loss, rel=1e-5, nan_ok=True)
        if max_length == 512:
            assert whole.num_losses == len(questions)
    if max_length < 512:
        assert any(0 < each["num_losses"] < each["num_examples"] for each in found.values())


POSSIBLE = [("loss", 1e9), ("num_examples", 1e9)]  # a client's own data may have these


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (column, value)
        for column in ("num_examples", "correct", "loss", "num_losses")
        for value in (float("inf"), float("nan"), 1e9, -1.0)
        if (column, value) not in POSSIBLE
    ],
)
def test_impossible_evaluation_results_of_a_client_are_left_out(column, value):
    rounds = Rounds(of_method("fedsa_lora", data={"train_examples": 24, "test_examples": 8}), workers=3)
    honest = rounds.grid._app

    def falsify_column(message, context):
        reply = honest(message, context)
        if context.node_id == 2:
            metrics = reply.content.metric_records[METRICS]
            for name in [name for name in metrics if name.endswith(f"/{column}")]:
                metrics[name] = [value] * len(metrics[name])
        return reply

    rounds.strategy.asking.client_nodes = lambda clients: {client: client + 1 for client in clients}
    rounds.grid._app = falsify_column
    found = rounds.strategy.personal_evaluation(0, rounds.grid)
    for each in found.values():
        assert each["num_examples"] < 8, "its questions are left out"
        assert 0 <= each["accuracy"] <= 1

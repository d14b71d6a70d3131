"""What a worker does with a message: it trains the cohort of clients that the message names, takes their initial gradients, or evaluates
their personal models.

First it brings its model to the global state of the message; where it lacks something it says so, and is sent the request again with all.
What clients keep for themselves from round to round lies in the node's Context.
"""

import json
from collections.abc import Callable, Iterable, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedsim.config import Config, from_dict
from fedsim.core.adapters import bound, merged
from fedsim.core.dropout import Stage
from fedsim.flower import secure_worker
from fedsim.flower.records import arrays_to_record, numbers, to_record, whole_numbers
from fedsim.flower.transfer import control_of, take_in
from fedsim.session import PERSONAL, ClientReply, Memory, Session, open_session
from fedsim.training.evaluation import evaluate as evaluate_examples

NEEDS_STATE = "needs_state"
"""Name of a record in the reply of a worker that lacks something of the global state."""
REFUSED = 1000
"""Code of the error with which a client answers what its owner does not accept; Flower's own are below 100."""


def client_key(client: int) -> str:
    """Returns the name of a client's record in a reply."""
    return f"client-{client}"


def control_key(client: int) -> str:
    """Returns the name of the record with the change of a client's control variate."""
    return f"control-{client}"


def memory_key(client: int, round: int) -> str:
    """Returns the name, in the state of its node's Context, of what a client keeps after a round."""
    return f"memory-{client}-{round}"


def handle(message: Message, context: Context) -> Message:
    """Does what a message asks for, by its type. Raises ValueError for a type that no handler is for.

    This is all that a ClientApp, a worker process or a Grid needs to know of the kinds of messages.
    """
    kind = message.metadata.message_type
    if kind not in HANDLERS:
        raise ValueError(f"Expected a message of one of the types {', '.join(HANDLERS)}, got {kind!r:.60}.")
    return HANDLERS[kind](message, context)


def train(message: Message, context: Context) -> Message:
    """Trains the named clients for one round; the reply has one record of factors per client, and their metrics."""
    secure_worker.take_shares(message, context)
    return _with_state(message, lambda session, request: _train(session, request, message.content, context))


def initial_gradient(message: Message, context: Context) -> Message:
    """Returns the weight gradients of each named client over its share of the initialisation samples."""

    def gradients(session: Session, request: ConfigRecord) -> RecordDict:
        content = RecordDict()
        clients = whole_numbers(request, "clients")
        noise: list[float | None] = [*numbers(request, "noise")] if "noise" in request else [None] * len(clients)
        rates = numbers(request, "rates") if "noise" in request else [0.0] * len(clients)
        for client, samples, own, rate in zip(clients, whole_numbers(request, "samples"), noise, rates, strict=True):
            gradient = session.client_gradient(client, samples, own, int(request["round"]), rate)  # type: ignore[arg-type]
            if session.config.privacy.secure_aggregation:
                content[client_key(client)] = secure_worker.masked_gradient(session, request, context, client, gradient)
            else:
                content[client_key(client)] = to_record(gradient)
        return content

    secure_worker.take_shares(message, context)
    return _with_state(message, gradients)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluates each named client's personal model on its share of the test questions: client k of n takes every n-th from the k-th on."""
    return _with_state(message, lambda session, request: _evaluate(session, request, context))


def read_memory(context: Context, clients: Iterable[int], round: int) -> Memory:
    """Returns what the clients keep for themselves after a round: what they have put down in it, or last before it."""
    memory: Memory = {}
    for client in clients:
        kept = [number for number in _kept_rounds(context, client) if number <= round]
        record = context.state.array_records[memory_key(client, kept[-1])] if kept else ArrayRecord()
        memory[client] = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    return memory


def write_memory(context: Context, memory: Memory, round: int) -> None:
    """Keeps what the clients keep for themselves after a round, and what they kept before it; clients without anything leave no record.

    So a round that is asked for again, because the server has lost it or begins anew, starts from what was there when it was asked first.
    """
    for client, own in memory.items():
        if own:
            kept = _kept_rounds(context, client)
            before = [number for number in kept if number < round][-1:]
            for number in set(kept) - set(before):
                del context.state[memory_key(client, number)]
            context.state[memory_key(client, round)] = arrays_to_record(own)


def _kept_rounds(context: Context, client: int) -> list[int]:
    """Returns the rounds after which the client has put something down, in ascending order."""
    head = memory_key(client, 0)[:-1]
    return sorted(int(name.removeprefix(head)) for name in context.state.array_records if name.startswith(head))


def _with_state(message: Message, work: Callable[[Session, ConfigRecord], RecordDict]) -> Message:
    request, session = message.content.config_records["request"], _session_of(message)
    if not take_in(session, message.content, request):
        return Message(RecordDict({NEEDS_STATE: ConfigRecord(), "request": request}), reply_to=message)
    return Message(work(session, request), reply_to=message)


def _session_of(message: Message) -> Session:
    return open_session(from_dict(Config, json.loads(str(message.content.config_records["request"]["config"]))))


def _train(session: Session, request: ConfigRecord, content: RecordDict, context: Context) -> RecordDict:
    clients = secure_worker.present(session, request, Stage.upload)
    if not clients:
        return RecordDict({"metrics": _metrics([])})
    noise = dict(zip(whole_numbers(request, "clients"), numbers(request, "noise"), strict=True)) if "noise" in request else {}
    number = int(request["round"])  # type: ignore[arg-type]
    memory = read_memory(context, clients, number - 1)
    replies = session.train(
        clients,
        number,
        memory,
        control_of(session, content),
        noise=[noise[client] for client in clients] if noise else (),
        clip_norm=float(request["clip_norm"]) if "clip_norm" in request else None,  # type: ignore[arg-type]
    )
    write_memory(context, memory, number)
    if session.config.privacy.secure_aggregation:
        return RecordDict({client_key(r.result.client): secure_worker.masked_update(session, request, context, r) for r in replies})
    answer = RecordDict({client_key(reply.result.client): arrays_to_record(reply.arrays) for reply in replies})
    for reply in replies:
        if reply.control is not None:
            answer[control_key(reply.result.client)] = to_record(reply.control)
    answer["metrics"] = _metrics(replies)
    return answer


def _metrics(replies: Sequence[ClientReply]) -> MetricRecord:
    results = [reply.result for reply in replies]
    return MetricRecord(
        {
            "clients": [result.client for result in results],
            "num_examples": [result.num_examples for result in results],
            "num_tokens": [result.num_tokens for result in results],
            "num_steps": [result.num_steps for result in results],
            "loss": [result.loss for result in results],
            "within": [int(reply.within) for reply in replies],
        }
    )


def _evaluate(session: Session, request: ConfigRecord, context: Context) -> RecordDict:
    tasks = list(session.data.test)
    metrics: dict[str, int | float | list[int] | list[float]] = {}
    clients, all_clients = whole_numbers(request, "clients"), session.config.federation.clients
    kinds = session.method.personal
    memory = read_memory(context, clients, int(request["round"]))  # type: ignore[arg-type]
    for task in tasks:
        correct, loss, counts = [], [], []
        for client in clients:
            examples = session.data.test[task][client::all_clients]
            own = memory[client].get(PERSONAL)
            personal = {} if own is None else session.spec.layout(kinds).unpack(own.to(session.device))
            with bound(session.model, personal), merged(session.model):
                found = evaluate_examples(session.model, session.tokenizer, examples, session.config.evaluation, session.config.data)
            correct.append(found.accuracy * len(examples))
            loss.append(found.loss * len(examples) if examples else 0.0)
            counts.append(len(examples))
        metrics |= {f"{task}/correct": correct, f"{task}/loss": loss, f"{task}/num_examples": counts}
    return RecordDict({"metrics": MetricRecord(metrics)})


def _secure(stage: Callable[[Session, Message, Context], Message]) -> Callable[[Message, Context], Message]:
    return lambda message, context: stage(_session_of(message), message, context)


HANDLERS: dict[str, Callable[[Message, Context], Message]] = {
    "train": train,
    "train.initial_gradient": initial_gradient,
    "evaluate": evaluate,
    "query.secure_keys": _secure(secure_worker.keys),
    "query.secure_shares": _secure(secure_worker.shares),
    "query.secure_unmask": _secure(secure_worker.unmask),
}
"""What is done with a message, by its type; a new kind of message is one more line."""

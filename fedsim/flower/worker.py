"""Handles a message at a worker: trains the named clients, computes their initial gradients, or evaluates their personal models.

First the worker brings its model to the global state of the message; if it lacks a part it says so, and is sent the request again with
the whole state. Local state that clients keep between rounds is in the node's Context.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite, isnan

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedsim.choices import PrivacyUnit
from fedsim.core.adapters import bound, merged
from fedsim.core.dropout import Stage
from fedsim.flower import secure_worker
from fedsim.flower.records import arrays_to_record, to_record
from fedsim.flower.requests import METRICS, Request
from fedsim.flower.transfer import control_of, install_received
from fedsim.initial_gradient import client_gradient
from fedsim.local_round import PERSONAL, VALUES, ClientReply, Memory, train_clients
from fedsim.session import Session, open_session
from fedsim.training.evaluation import evaluate as evaluate_examples

TRAIN, INITIAL_GRADIENT, EVALUATE = "train", "train.initial_gradient", "evaluate"
"""Message types; those of secure aggregation are in `fedsim.flower.secure_worker`."""
NEEDS_STATE = "needs_state"
"""Name of the record in the reply of a worker that lacks a part of the global state."""
REFUSED = 1000
"""Code of the error with which a client refuses a request its owner does not accept; Flower's own codes are below 100."""


def client_key(client: int) -> str:
    """Returns the name of a client's record in a reply."""
    return f"client-{client}"


def control_key(client: int) -> str:
    """Returns the name of the record with the change of a client's control variate."""
    return f"control-{client}"


def memory_key(client: int, round: int) -> str:
    """Returns the name of a client's local state after a round, in the state of its node's Context."""
    return f"memory-{client}-{round}"


def handle(message: Message, context: Context) -> Message:
    """Handles a message by its type. Raises ValueError for a type without a handler.

    This is all that a ClientApp, a worker process or a Grid needs to know about message types.
    """
    kind = message.metadata.message_type
    if kind not in HANDLERS:
        raise ValueError(f"Expected a message of one of the types {', '.join(HANDLERS)}, got {kind!r:.60}.")
    return HANDLERS[kind](message, context)


def train(message: Message, context: Context) -> Message:
    """Trains the named clients for one round; the reply has one record of factors per client, and their metrics."""
    return _with_state(message, context, lambda session, request: _train(session, request, message.content, context))


def initial_gradient(message: Message, context: Context) -> Message:
    """Computes the weight gradients of each named client over its share of the initialisation samples."""

    def gradients(session: Session, request: Request) -> RecordDict:
        secure_worker.check_gradient(session.config, request)
        content = RecordDict()
        noise: list[float | None] = [*request.noise] if request.noise else [None] * len(request.clients)
        for client, samples, own, rate in zip(request.clients, request.samples, noise, request.rates, strict=True):
            gradient = client_gradient(session, client, samples, own, request.round, rate)
            if session.config.privacy.secure_aggregation:
                if gradient.isfinite().all():
                    content[client_key(client)] = secure_worker.masked_gradient(session, request, context, client, gradient)
            else:
                content[client_key(client)] = to_record(gradient)
        return content

    return _with_state(message, context, gradients)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluates each named client's personal model on its share of the test questions: client k of n takes every n-th, starting at k."""
    return _with_state(message, context, lambda session, request: _evaluate(session, request, context))


Accepted = Mapping[int, int]
"""The last round in which a client's upload became part of the global state, by client; a missing client has none yet."""


def read_memory(context: Context, clients: Iterable[int], accepted: Accepted) -> Memory:
    """Returns the clients' local state after the last round in which their upload was accepted.

    State left by a later round is ignored: that upload was lost or refused, so for the server the round did not happen.
    """
    memory: Memory = {}
    for client in clients:
        record = context.state.array_records.get(memory_key(client, accepted.get(client, 0)), ArrayRecord())
        memory[client] = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    return memory


def write_memory(context: Context, memory: Memory, round: int, accepted: Accepted) -> None:
    """Stores the clients' local state after a round, and keeps the one the round began with; clients without any leave no record."""
    kept = {client: own for client, own in memory.items() if own}
    heads = {memory_key(client, 0)[:-1] for client in kept}
    bases = {memory_key(client, accepted.get(client, 0)) for client in kept}
    for name in [name for name in context.state.array_records if name.rstrip("0123456789") in heads and name not in bases]:
        del context.state[name]
    for client, own in kept.items():
        context.state[memory_key(client, round)] = arrays_to_record(own)


def _with_state(message: Message, context: Context, work: Callable[[Session, Request], RecordDict]) -> Message:
    request = Request.of(message.content)
    session = open_session(request.config)
    secure_worker.take_shares(request, message, context)
    if not install_received(session, message.content, request):
        return Message(RecordDict({NEEDS_STATE: ConfigRecord()}), reply_to=message)
    return Message(work(session, request), reply_to=message)


def _train(session: Session, request: Request, content: RecordDict, context: Context) -> RecordDict:
    secure_worker.check_upload(session.config, request)
    clients = secure_worker.present(session, request, Stage.upload)
    if not clients:
        return RecordDict({METRICS: _metrics(request.round, [])})
    noise = dict(zip(request.clients, request.noise, strict=True)) if request.noise else {}
    memory, control = read_memory(context, clients, request.accepted), control_of(session, content)
    own_noise = [noise[client] for client in clients] if noise else ()
    replies = train_clients(session, clients, request.round, memory, control, noise=own_noise, clip_norm=request.clip_norm)
    write_memory(context, memory, request.round, request.accepted)
    if session.config.privacy.secure_aggregation:
        return RecordDict(
            {
                client_key(r.result.client): secure_worker.masked_update(session, request, context, r)
                for r in replies
                if _may_be_summed(session, r)
            }
        )
    answer = RecordDict({client_key(reply.result.client): arrays_to_record(reply.arrays) for reply in replies})
    for reply in replies:
        if reply.control is not None:
            answer[control_key(reply.result.client)] = to_record(reply.control)
    answer[METRICS] = _metrics(request.round, replies)
    return answer


def _may_be_summed(session: Session, reply: ClientReply) -> bool:
    """Whether an upload has not diverged. The server could not detect it behind masks, so the client leaves it out."""
    loss = reply.result.loss
    valid = isfinite(loss) or (isnan(loss) and session.config.privacy.unit is not PrivacyUnit.none)  # a NaN is a withheld loss
    return valid and bool(reply.arrays[VALUES].isfinite().all())


def _metrics(round: int, replies: Sequence[ClientReply]) -> MetricRecord:
    results = [reply.result for reply in replies]
    return MetricRecord(
        {
            "round": round,
            "clients": [result.client for result in results],
            "num_examples": [result.num_examples for result in results],
            "num_tokens": [result.num_tokens for result in results],
            "loss": [result.loss for result in results],
            "within": [int(reply.within) for reply in replies],
        }
    )


def _evaluate(session: Session, request: Request, context: Context) -> RecordDict:
    metrics: dict[str, int | float | list[int] | list[float]] = {}
    clients, all_clients = request.clients, session.config.federation.clients
    kinds = session.method.personal
    memory = read_memory(context, clients, request.accepted)
    for task in request.tasks:  # the server's names: task names in a client's data stay there
        correct, loss, counts, losses = [], [], [], []
        for client in clients:
            examples = session.data.test.get(task, [])[client::all_clients]
            own = memory[client].get(PERSONAL)
            personal = {} if own is None else session.spec.layout(kinds).unpack(own.to(session.device))
            with bound(session.model, personal), merged(session.model):
                found = evaluate_examples(
                    session.model,
                    session.tokenizer,
                    examples,
                    session.config.evaluation,
                    session.config.data,
                    budget=session.answer_budget,
                )
            correct.append(found.accuracy * len(examples))
            loss.append(found.loss * found.num_losses if found.num_losses else 0.0)
            counts.append(len(examples))
            losses.append(found.num_losses)
        metrics |= {f"{task}/correct": correct, f"{task}/loss": loss, f"{task}/num_examples": counts, f"{task}/num_losses": losses}
    return RecordDict({METRICS: MetricRecord(metrics)})


def _secure(stage: Callable[[Session, Request, Message, Context], Message]) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        request = Request.of(message.content)
        return stage(open_session(request.config), request, message, context)

    return answer


HANDLERS: dict[str, Callable[[Message, Context], Message]] = {
    TRAIN: train,
    INITIAL_GRADIENT: initial_gradient,
    EVALUATE: evaluate,
    secure_worker.KEYS: _secure(secure_worker.keys),
    secure_worker.SHARES: _secure(secure_worker.shares),
    secure_worker.UNMASK: _secure(secure_worker.unmask),
}
"""Handlers by message type; a new message type is one more line."""

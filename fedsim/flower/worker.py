"""What a worker does with a message: it trains the cohort of clients that the message names, or takes their initial gradients.

A worker that lacks the common bases derives them where that needs no data, and otherwise says so instead of training; what it has is
checked against the digest in every message.
"""

import json

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.config import Config, from_dict
from fedsim.flower.records import from_record, to_record, whole_numbers
from fedsim.session import DERIVED, Session, open_session

NEEDS_BASES = "needs_bases"


def client_key(client: int) -> str:
    """Returns the name of a client's record in a reply."""
    return f"client-{client}"


def train(message: Message) -> Message:
    """Trains the named clients for one round; the reply has one record of factors per client, and their metrics."""
    request = message.content.config_records["request"]
    session = _session(request)
    if not _has_bases(session, message.content):
        return Message(RecordDict({NEEDS_BASES: ConfigRecord(), "request": request}), reply_to=message)
    start = from_record(message.content.array_records["adapter"], session.layout.num_parameters)
    (round_,) = whole_numbers(request, "round")
    results = session.train(start, whole_numbers(request, "clients"), round_)
    content = RecordDict({client_key(result.client): to_record(result.factors) for result in results})
    content["metrics"] = MetricRecord(
        {
            "clients": [result.client for result in results],
            "num_examples": [result.num_examples for result in results],
            "num_tokens": [result.num_tokens for result in results],
            "num_steps": [result.num_steps for result in results],
            "loss": [result.loss for result in results],
        }
    )
    return Message(content, reply_to=message)


def initial_gradient(message: Message) -> Message:
    """Returns the weight gradients of each named client over its share of the initialisation samples."""
    request = message.content.config_records["request"]
    session = _session(request)
    content = RecordDict()
    for client, samples in zip(whole_numbers(request, "clients"), whole_numbers(request, "samples"), strict=True):
        content[client_key(client)] = to_record(session.client_gradient(client, samples))
    return Message(content, reply_to=message)


def _session(request: ConfigRecord) -> Session:
    return open_session(from_dict(Config, json.loads(str(request["config"]))))


def _has_bases(session: Session, content: RecordDict) -> bool:
    """Makes sure that the model has the bases of the digest in the request. Raises ValueError if the ones sent or derived differ."""
    expected = str(content.config_records["request"]["bases_digest"])
    if session.bases_digest == expected:
        return True
    if session.config.adapter.init in DERIVED:
        from fedsim.core.initialization import bases_of

        found = session.install_bases(bases_of(session.derive_bases()))
    elif "bases" in content:
        flat = from_record(content.array_records["bases"], session.bases_layout.num_parameters)
        found = session.install_bases(session.bases_layout.unpack(flat))
    else:
        return False
    if found != expected:
        raise ValueError(f"Expected bases with digest {expected[:16]}..., got {found[:16]}...: the server and this worker disagree.")
    return True

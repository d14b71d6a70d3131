"""The client's side of secure aggregation over Flower messages: keys, shares, a masked upload, unmasking.

Every client is its own party even if one worker holds a cohort: its secrets are in its own record in the Context of its node (which
a client's worker keeps in its owner's folder), never in a message or a checkpoint, and are deleted after the unmasking.
"""

import hashlib
from collections.abc import Sequence
from math import isnan

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsim.choices import PrivacyUnit, Weighting
from fedsim.config import Config
from fedsim.core.adapters import factors
from fedsim.core.distributed_noise import clipped_integers, share_of_variance, skellam_noise
from fedsim.core.dropout import Stage, responding
from fedsim.core.quantization import LOSS_UNITS, Quantizer, gradient_quantizer, residues, upload_quantizer
from fedsim.core.secret_sharing import SHARE_BYTES
from fedsim.core.secure_aggregation import KEY_BYTES, SEALED_BYTES, Party, fewest_survivors
from fedsim.flower.records import arrays_from_record, arrays_to_record, byte_rows, identifiers, record_of, whole_numbers
from fedsim.flower.requests import METRICS, SETUP, Request, needed
from fedsim.local_round import VALUES, ClientReply
from fedsim.seeding import numpy_generator
from fedsim.session import Session

KEYS, SHARES, UNMASK = "query.secure_keys", "query.secure_shares", "query.secure_unmask"
"""Message types of the protocol, except the one that asks for uploads."""


def secure_key(client: int) -> str:
    """Returns the name of a client's protocol record in requests and replies."""
    return f"secure-{client}"


def party_key(client: int) -> str:
    """Returns the name of the record with a client's secrets in the state of its node's Context."""
    return f"party-{client}"


def keys(session: Session, request: Request, message: Message, context: Context) -> Message:
    """Makes each named client's keys for the round and returns the public ones with its number of examples."""
    clients = present(session, request, Stage.keys)
    content = RecordDict()
    for client in clients:
        party = Party(client)
        _keep(context, party)
        content[secure_key(client)] = arrays_to_record({"keys": byte_rows(party.public, KEY_BYTES).flatten()})
    counts = [len(session.client_data(client).examples) for client in clients]
    content[METRICS] = MetricRecord({"clients": clients, "num_examples": counts})
    return Message(content, reply_to=message)


def shares(session: Session, request: Request, message: Message, context: Context) -> Message:
    """Returns each client's shares of its secrets, sealed for the neighbours whose keys arrived."""
    thresholds = dict(zip(request.clients, whole_numbers(request.record, "thresholds"), strict=True))
    content = RecordDict()
    for client in present(session, request, Stage.shares):
        party, record = _party(context, client), record_of(message.content.array_records, secure_key(client))
        peers = identifiers(record, "peers")
        arrays = arrays_from_record(record, {"peers": (torch.int64, (len(peers),)), "keys": (torch.uint8, (len(peers), 2 * KEY_BYTES))})
        publics = [(bytes(row[:KEY_BYTES]), bytes(row[KEY_BYTES:])) for row in arrays["keys"].numpy()]
        least = max(2, fewest_survivors(len(peers) + 1, session.config.secure.threshold))
        if not peers or thresholds[client] < least:
            raise ValueError(
                f"Expected neighbours and a threshold of {least} or more (secure.threshold), got {len(peers)} and {thresholds[client]}: "
                "too few could open the sum."
            )
        sealed = party.share(dict(zip(peers, publics, strict=True)), thresholds[client])
        _keep(context, party)
        content[secure_key(client)] = arrays_to_record({"sealed": byte_rows([sealed[peer] for peer in peers], SEALED_BYTES)})
    return Message(content, reply_to=message)


def take_shares(request: Request, message: Message, context: Context) -> None:
    """Stores the sealed shares in a request for uploads."""
    records = message.content.array_records  # rebuilt by Flower on each access
    for client in request.clients:
        record = records.get(secure_key(client))
        if record is not None:
            peers = identifiers(record, "peers")
            types = {"peers": (torch.int64, (len(peers),)), "sealed": (torch.uint8, (len(peers), SEALED_BYTES))}
            party, rows = _party(context, client), arrays_from_record(record, types)["sealed"].numpy()
            party.take({peer: bytes(row) for peer, row in zip(peers, rows, strict=True)})
            _keep(context, party)


def masked(context: Context, client: int, quantizer: Quantizer, integers: NDArray[np.int64]) -> ArrayRecord:
    """Returns the record of a client's masked integers, the only form in which its values leave it."""
    party = _party(context, client)
    sent = party.masked(residues(integers))
    _keep(context, party)
    return arrays_to_record({"masked": torch.from_numpy(quantizer.to_wire(sent))})


def unmask(session: Session, request: Request, message: Message, context: Context) -> Message:
    """Returns each client's shares of the survivors' seeds and the vanished ones' masking keys, in that order, and forgets the round.

    Raises ValueError if the client already helped to unmask a sum of this round over other survivors.
    """
    content = RecordDict()
    for client in present(session, request, Stage.unmasking):
        record, party = record_of(message.content.array_records, secure_key(client)), _party(context, client)
        survivors, vanished = (identifiers(record, name) for name in ("survivors", "vanished"))
        _unmask_once(context, client, f"{request.round} {request.setup}", survivors)
        revealed = party.reveal(survivors, vanished)
        del context.state[party_key(client)]
        content[secure_key(client)] = arrays_to_record({"shares": byte_rows([*revealed.values()], SHARE_BYTES)})
    return Message(content, reply_to=message)


def _unmask_once(context: Context, client: int, what: str, survivors: Sequence[int]) -> None:
    """Raises ValueError for a second sum of the same round over other survivors.

    A round repeated by a resumed server has mostly the same uploads: two sums would differ by those of single clients.
    """
    key, digest = f"unmasked-{client}", hashlib.sha256(repr(sorted(survivors)).encode()).hexdigest()[:32]
    kept = context.state.config_records.get(key, ConfigRecord())
    if kept.setdefault(what, digest) != digest:
        raise ValueError(
            f"Expected the survivors of the sum that client {client} has helped to unmask before, got others: the difference of the two "
            "sums would show single uploads. Start a new run with another seed."
        )
    context.state[key] = ConfigRecord(dict(kept))


def present(session: Session, request: Request, stage: Stage) -> list[int]:
    """Returns the named clients that respond at this stage, by the simulated drop-out."""
    return request.clients if request.setup else responding(session.config, request.round, request.clients, stage, session.dropouts)


def check_upload(config: Config, request: Request) -> None:
    """Raises ValueError if the request lacks a field that a masked upload needs; called before training."""
    if not config.privacy.secure_aggregation:
        return
    needed(request.contributors, "contributors")
    if config.privacy.unit is PrivacyUnit.client:
        needed(request.noise_multiplier, "noise_multiplier")
        needed(request.clip_norm, "clip_norm")
    elif config.federation.weighting is Weighting.examples:
        needed(request.largest, "largest")


def check_gradient(config: Config, request: Request) -> None:
    """Raises ValueError if the request lacks a field that a masked initial gradient needs."""
    if config.privacy.secure_aggregation:
        needed(request.contributors, "contributors")
        needed(request.gradient_range, "gradient_range")


def weight_of(session: Session, request: Request, client: int) -> float:
    """Returns the client's weight in the sum, 1 for the largest. Raises ValueError if the client exceeds the server's largest count."""
    if session.config.federation.weighting is Weighting.uniform:
        return 1.0
    own, largest = len(session.client_data(client).examples), needed(request.largest, "largest")
    if own > largest:
        raise ValueError(f"Expected at most {largest} examples, got the {own} of client {client}.")
    return own / largest


def rounding_generator(session: Session, request: Request, client: int) -> np.random.Generator:
    """Returns the generator of a client's stochastic rounding."""
    words = (SETUP,) if request.setup else ()
    return numpy_generator(session.config.seed, "quantization", *words, request.round, client)


def masked_update(session: Session, request: Request, context: Context, reply: ClientReply) -> ArrayRecord:
    """Returns the masked, weighted change of a client's factors with its counters: clipped entries, tokens, and loss times examples.

    With client-level privacy it is the clipped change plus the client's share of the noise, without counters.
    """
    client, clients = reply.result.client, needed(request.contributors, "contributors")
    kinds = session.method.uploaded(request.round)
    start = session.spec.pack(factors(session.model, kinds), kinds).cpu()
    quantizer = upload_quantizer(session.config, clients, request.clip_norm)
    values = (reply.arrays[VALUES].double() - start.double()).numpy()
    if session.config.privacy.unit is PrivacyUnit.client:
        return masked(context, client, quantizer, _noised(session, request, client, quantizer, values))
    integers, clipped = quantizer.rounded(values, weight_of(session, request, client), rounding_generator(session, request, client))
    loss = 0.0 if isnan(reply.result.loss) else reply.result.loss * reply.result.num_examples * LOSS_UNITS
    return masked(context, client, quantizer, with_counters(quantizer, integers, (clipped, reply.result.num_tokens, loss)))


def _noised(session: Session, request: Request, client: int, quantizer: Quantizer, update: NDArray[np.float64]) -> NDArray[np.int64]:
    options, server_round = session.config.secure, request.round
    fewest = fewest_survivors(quantizer.clients, options.threshold)
    variance = share_of_variance(needed(request.noise_multiplier, "noise_multiplier"), quantizer, fewest)
    generator = session.noise_key.numpy("client noise", server_round, client)
    integers = clipped_integers(update, quantizer, rounding_generator(session, request, client))
    return integers + skellam_noise(len(integers), variance, generator)


def masked_gradient(session: Session, request: Request, context: Context, client: int, gradient: Tensor) -> ArrayRecord:
    """Returns a client's masked initial gradient with its counter of clipped entries."""
    quantizer = gradient_quantizer(needed(request.gradient_range, "gradient_range"), needed(request.contributors, "contributors"))
    integers, clipped = quantizer.rounded(gradient.double().numpy(), 1.0, rounding_generator(session, request, client))
    return masked(context, client, quantizer, with_counters(quantizer, integers, (clipped,)))


def with_counters(quantizer: Quantizer, values: NDArray[np.int64], counters: Sequence[float]) -> NDArray[np.int64]:
    """Returns the integers with the counters' digits appended."""
    return np.concatenate([values, *(quantizer.counter(count) for count in counters)])


def _keep(context: Context, party: Party) -> None:
    context.state[party_key(party.client)] = ConfigRecord(
        {
            "secrets": [party.sealing, party.masking, party.seed],
            "threshold": party.threshold,
            "peers": list(party.peers),
            "publics": [key for pair in party.peers.values() for key in pair],
            "holders": list(party.held),
            "held": list(party.held.values()),
        }
    )


def _party(context: Context, client: int) -> Party:
    """Returns the stored party. Raises ValueError if this client has no round under way at this worker."""
    record = context.state.config_records.get(party_key(client))
    if record is None:
        raise ValueError(f"Expected a round of secure aggregation under way for client {client}, got none at this worker.")
    peers, publics = whole_numbers(record, "peers"), _secrets(record, "publics")
    sealing, masking, seed = _secrets(record, "secrets")
    return Party(
        client,
        sealing,
        masking,
        seed,
        threshold=int(record["threshold"]),  # type: ignore[arg-type]
        peers={peer: (publics[2 * i], publics[2 * i + 1]) for i, peer in enumerate(peers)},
        held=dict(zip(whole_numbers(record, "holders"), _secrets(record, "held"), strict=True)),
    )


def _secrets(record: ConfigRecord, name: str) -> list[bytes]:
    return [bytes(each) for each in record[name]]  # type: ignore[union-attr, arg-type]

"""One round of a cohort of clients: the factors each starts from, what it trains, and its upload.

Depending on the configuration, an upload holds the factors, their compressed change, or with client-level privacy their clipped change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import torch
from torch import Tensor

from fedsim.choices import PrivacyUnit
from fedsim.core.adapters import factors
from fedsim.core.compression import CODECS, compress
from fedsim.seeding import torch_generator
from fedsim.session import Session
from fedsim.training.cohort import LocalResult, LocalRule, train_cohort
from fedsim.training.optimizers import learning_rate
from fedsim.training.private import PrivateRule

Memory = dict[int, dict[str, Tensor]]
"""The state that clients keep between rounds: flat arrays by client and name."""

PERSONAL, OWN_CONTROL, RESIDUE = "personal", "control", "residue"  # names in a client's memory
VALUES = "values"  # the one array of an upload that is not compressed


@dataclass(frozen=True)
class ClientReply:
    """A client's upload after local training, and its training result."""

    result: LocalResult
    arrays: dict[str, Tensor]  # the flat factors, or their compressed change
    control: Tensor | None  # change of SCAFFOLD's control variate
    within: bool = True  # whether the update was within the clip norm of client-level privacy


def train_clients(
    session: Session,
    clients: Sequence[int],
    round: int,
    memory: Memory,
    control: Tensor | None = None,
    *,
    noise: Sequence[float] = (),
    clip_norm: float | None = None,
) -> list[ClientReply]:
    """Trains the clients for one round from the installed state, as one cohort, and returns their replies.

    `memory` is the clients' state between rounds, updated in place. `control` is SCAFFOLD's c. With `privacy.unit=example`, `noise` holds
    the clients' noise multipliers; with unit=client, `clip_norm` bounds a client's update.
    """
    options, kinds = session.config, session.method.trained(round)
    start = _starts(session, kinds, clients, memory)
    results = train_cohort(
        session.model,
        start,
        session.spec.layout(kinds),
        [session.client_data(client) for client in clients],
        options.training,
        pad_id=session.tokenizer.pad_token_id,
        seed=options.seed,
        round=round,
        rounds=options.federation.rounds,
        rule=LocalRule(options.training.proximal_mu, _shift(clients, memory, control), _trainable(session, kinds, clients, round)),
        private=PrivateRule(options.privacy.clip_norm, tuple(noise), session.noise_key)
        if options.privacy.unit is PrivacyUnit.example
        else None,
        budget=session.budget,
        on_pass=session.on_pass,
    )
    return [_upload(session, result, row, round, memory, control, clip_norm) for result, row in zip(results, start, strict=True)]


def _starts(session: Session, kinds: Sequence[str], clients: Sequence[int], memory: Memory) -> Tensor:
    """Returns [clients, parameters]: the installed factors, a client's own where personal, zeros outside the block of a smaller rank.

    If all clients start alike, it is a view of one copy of the factors.
    """
    common = session.spec.pack(factors(session.model, kinds), kinds)
    starts = common.expand(len(clients), len(common))
    if not session.method.personal and session.ranks is None:
        return starts
    starts = starts.clone()
    for row, client in zip(starts, clients, strict=True):
        own = memory.get(client, {}).get(PERSONAL)
        if own is not None:
            row[session.spec.within(kinds, session.method.personal)] = own.to(row.device)
        positions = session.block(kinds, client)
        if positions is not None:
            held = row[positions]
            row.zero_()[positions] = held
    return starts


def _trainable(session: Session, kinds: Sequence[str], clients: Sequence[int], round: int) -> Tensor | None:
    positions = [session.trained_positions(kinds, round, client) for client in clients]
    if all(each is None for each in positions):
        return None
    masks = torch.ones(len(clients), session.spec.layout(kinds).num_parameters, dtype=torch.bool)
    for mask, each in zip(masks, positions, strict=True):
        if each is not None:
            mask.fill_(False)[each] = True
    return masks


def _shift(clients: Sequence[int], memory: Memory, control: Tensor | None) -> Tensor | None:
    if control is None:
        return None
    return torch.stack([control - memory.get(client, {}).get(OWN_CONTROL, torch.zeros_like(control)) for client in clients])


def _upload(
    session: Session, result: LocalResult, start: Tensor, round: int, memory: Memory, control: Tensor | None, clip_norm: float | None
) -> ClientReply:
    """Returns the reply of the result's client; `start`, on the model's device, is read only if the upload depends on it."""
    kinds, uploaded = session.method.trained(round), session.method.uploaded(round)
    layout, own = session.spec.layout(kinds), memory.setdefault(result.client, {})
    if session.method.personal:
        own[PERSONAL] = result.factors[session.spec.within(kinds, session.method.personal)]
    change = None if control is None else _control_change(session, result, start.cpu(), round, control, own)
    flat = result.factors
    if uploaded != kinds or session.method.before_upload:
        factors_ = layout.unpack(flat)
        flat = session.spec.pack(session.method.before_upload(factors_) if session.method.before_upload else factors_, uploaded)
    positions = session.sent_positions(round, result.client)
    flat = flat if positions is None else flat[positions]
    if session.config.privacy.unit is not PrivacyUnit.client and session.config.compression.name == "none":
        return ClientReply(result, {VALUES: flat}, change)
    origin = session.spec.pack(layout.unpack(start.cpu()), uploaded)
    update = flat - (origin if positions is None else origin[positions])
    if session.config.privacy.unit is PrivacyUnit.client:
        assert clip_norm is not None
        public = replace(result, loss=nan, num_tokens=0)  # nothing leaves the client without noise
        update, within = clipped_update(update, clip_norm)
        return ClientReply(public, {VALUES: origin + update}, None, within)
    return ClientReply(result, _compressed(session, update, round, result.client, own), change)


def clipped_update(update: Tensor, clip_norm: float) -> tuple[Tensor, bool]:
    """Returns the update [parameters], scaled to an L2 norm of at most `clip_norm`, and whether it was within that norm.

    An update that is not finite becomes zeros: omitting it, or sending it to be refused, would reveal the client without noise.
    """
    norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))  # float32 loses small entries among many
    if not isfinite(norm):
        return torch.zeros_like(update), False
    return update * min(1.0, clip_norm / max(norm, 1e-12)), norm <= clip_norm


def _control_change(session: Session, result: LocalResult, start: Tensor, round: int, control: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Updates c_i by SCAFFOLD's option II, to c_i - c + (x - y) / sum of the learning rates, and returns its change."""
    rounds = session.config.federation.rounds
    first, total = (round - 1) * result.num_steps, rounds * result.num_steps
    rates = sum(learning_rate(first + step, total, session.config.training) for step in range(result.num_steps))
    change = (start - result.factors) / rates - control
    own[OWN_CONTROL] = own.get(OWN_CONTROL, torch.zeros_like(control)) + change
    return change


def _compressed(session: Session, update: Tensor, round: int, client: int, own: dict[str, Tensor]) -> dict[str, Tensor]:
    options = session.config.compression
    residual = own.get(RESIDUE, torch.zeros_like(update)) if options.error_feedback else None
    generator = torch_generator(session.config.seed, "compression", round, client)
    arrays, _, residual = compress(update, residual, CODECS[options.name], generator, options.density)
    if residual is not None:
        own[RESIDUE] = residual
    return arrays

"""How a client's worker handles a message: it checks that the owner accepts it, then runs the same code as a simulation.

It answers the question whether a client joins; all other messages go to `fedsim.flower.worker.handle` with a Context that outlives the
process.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedsim
from clients.memory import Answers, Budget, ContextStore, experiment_key
from clients.owner import Owner, RefusedError, accept, own_view
from fedsim.choices import PrivacyUnit
from fedsim.config import Config
from fedsim.config_check import check
from fedsim.core.network import NO_NETWORK, POPULATIONS
from fedsim.core.participation import steps_per_round
from fedsim.core.traffic import GRADIENTS_NEED
from fedsim.errors import UserError
from fedsim.flower.records import numbers, whole_numbers
from fedsim.flower.requests import REQUEST, is_above_zero, texts
from fedsim.flower.roster import JOIN, Member
from fedsim.flower.transfer import ADAPTER, BASES, FOLD
from fedsim.flower.worker import EVALUATE, INITIAL_GRADIENT, NEEDS_STATE, REFUSED, TRAIN, handle
from fedsim.memory import give_back_gpu_memory
from fedsim.plain import from_text, to_dict
from fedsim.privacy.accounting import INITIALIZATION, Mechanism
from fedsim.seeding import NoiseKey
from fedsim.session import Session, open_session
from fedsim.training.private import coin_rate, sampling_rate
from fedsim.types import AnyEncoded

log = logging.getLogger("fedsim.worker")

FAILED = 4
"""Flower's error code for an exception in the ClientApp."""


class Desk:
    """Handles one client's messages, one after another; the base model stays loaded between them."""

    def __init__(self, owner: Owner) -> None:
        folder = Path(owner.folder)
        self._owner = owner
        self._store = ContextStore(folder / "memory")
        self._answers = Answers(folder / "answers")
        self._budget = Budget(folder / "privacy.json", owner)
        self._session: Session | None = None
        self._data_digest = b""  # of the session's data
        self._loads = 0

    def answer(self, message: Message) -> Message:
        """Returns the result, or an error with the reason why there is none. The reason never reveals anything about the data."""
        metadata, begun = message.metadata, time.perf_counter()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = metadata.run_id, metadata.dst_node_id, metadata.run_id
        what = f"{metadata.message_type} of run {metadata.run_id}, round {metadata.group_id or '-'}"
        try:
            reply = self._execute(message)
            log.info("done: %s, %.2f s", what, time.perf_counter() - begun)
        except RefusedError as refusal:
            log.warning("refused: %s: %s", what, refusal)
            reply = Message(Error(REFUSED, f"Refused by the owner of client {self._owner.client}: {refusal}"), reply_to=message)
        except Exception as error:
            log.exception("failed: %s", what)
            reason = f"The worker of client {self._owner.client} failed ({type(error).__name__}); its log says why."
            reply = Message(Error(FAILED, reason), reply_to=message)
        give_back_gpu_memory()  # this process may idle for days while others need it
        return reply

    def _execute(self, message: Message) -> Message:
        request = message.content.config_records[REQUEST]
        asked = self._accepted_config(request)
        here = own_view(self._owner, asked)
        session = self._open(here)
        if message.metadata.message_type == JOIN:
            return Message(self._join_reply(session), reply_to=message)
        mechanism = self._accepted_mechanism(message.metadata.message_type, request, session)
        context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, self._store.load(experiment_key(asked)), {})
        own = RecordDict({**message.content, REQUEST: ConfigRecord({**request, "config": json.dumps(to_dict(here))})})
        kind, digest = f"{experiment_key(here)}-{message.metadata.message_type}", ""
        if mechanism is not None and not here.privacy.secure_aggregation:  # a masked answer is of no use a second time
            digest = self._request_digest(message.metadata.message_type, request, session)
            if (said := self._answers.said(kind, digest)) is not None:
                return Message(said, reply_to=message)
        if here.privacy.unit is not PrivacyUnit.none:
            session.noise_key = NoiseKey.secret()  # for this answer only
        if mechanism is not None:
            self._budget.check(mechanism, self._num_examples(session))
        reply = handle(Message(own, metadata=message.metadata), context)  # type: ignore[call-overload]  # as Flower itself rebuilds them
        if NEEDS_STATE in reply.content:
            reply.content[REQUEST] = request  # unchanged: it has none of the owner's paths
            return reply
        if mechanism is not None:
            self._budget.charge(mechanism, self._num_examples(session))
        self._store.save(experiment_key(asked), context.state)
        if digest:
            self._answers.keep(kind, digest, reply.content)
        return reply

    def _accepted_config(self, request: ConfigRecord) -> Config:
        """Returns the configuration of a request. Raises RefusedError if it is invalid or the owner does not accept it."""
        try:
            config = from_text(str(request["config"]))
            check(config)
        except (UserError, KeyError, ValueError) as error:
            raise RefusedError(f"the configuration is not one of fedsim {fedsim.__version__}: {error!s:.200}") from error
        if config.federation.network not in (NO_NETWORK, *POPULATIONS):
            raise RefusedError("federation.network names a file, and no message opens a file here")
        accept(self._owner, config)
        if "clients" in request and whole_numbers(request, "clients") != [self._owner.client]:
            raise RefusedError(f"the message names clients {whole_numbers(request, 'clients')!r:.60}, this is client {self._owner.client}")
        return config

    def _accepted_mechanism(self, kind: str, request: ConfigRecord, session: Session) -> Mechanism | None:
        """Returns the work's privacy mechanism, None if it spends nothing. Raises RefusedError if the owner does not accept the work."""
        config, size = session.config, self._num_examples(session)
        steps = steps_per_round(size, config.training)
        if kind == TRAIN and steps > self._owner.max_local_steps:
            raise RefusedError(f"{steps} local steps are more than the {self._owner.max_local_steps} accepted")
        if kind == EVALUATE and not self._owner.shard and (self._promises_privacy(config) or self._owner.masked_only):
            raise RefusedError("its test rows are the owner's, and how many are answered right would leave without noise or mask")
        masked = config.privacy.unit is PrivacyUnit.client and config.privacy.secure_aggregation and kind == TRAIN
        if masked:
            self._check_noise(kind, request, "noise_multiplier")
        if config.privacy.unit is PrivacyUnit.client and kind == INITIAL_GRADIENT:
            raise RefusedError("an initial gradient would leave as it is, which privacy.unit=client does not cover")
        if config.privacy.unit is not PrivacyUnit.example or not kind.startswith(TRAIN):
            return None
        if "noise" not in request:
            raise RefusedError(f"{kind} would leave without noise")
        self._check_noise(kind, request, "noise")
        (noise,) = numbers(request, "noise")
        batch = config.training.batch_size * config.training.accumulation
        mechanism = Mechanism(noise, sampling_rate(size, batch), steps)
        if kind == INITIAL_GRADIENT:
            (rate,) = numbers(request, "rates")
            mechanism = Mechanism(noise, coin_rate(rate), 1, INITIALIZATION)
        return mechanism

    def _check_noise(self, kind: str, request: ConfigRecord, key: str) -> None:
        """Raises RefusedError for zero or missing noise if the owner requires privacy."""
        values = request.get(key)
        given = all(map(is_above_zero, values if isinstance(values, list) else [values]))
        if self._owner.min_privacy != PrivacyUnit.none.name and not given:
            raise RefusedError(f"{kind} would leave without the noise that min_privacy={self._owner.min_privacy} asks for")

    def _promises_privacy(self, config: Config) -> bool:
        """Returns whether the run or the owner promises privacy to the people in the data."""
        return config.privacy.unit is not PrivacyUnit.none or self._owner.min_privacy != PrivacyUnit.none.name

    def _request_digest(self, kind: str, request: ConfigRecord, session: Session) -> str:
        """Returns a digest of a request, the data and the model behind its answer, unique within its kind and experiment."""
        asked = {name: value for name, value in request.items() if name not in ("config", ADAPTER, BASES, FOLD, "fold_shapes", "fold_on")}
        named = texts(request, "digests") if "digests" in request else {}
        parts = GRADIENTS_NEED if kind == INITIAL_GRADIENT else session.digests  # a restarted worker has no factors installed
        installed = {part: session.digests[part] for part in parts if part in session.digests and part not in named}
        self._data_digest = self._data_digest or digest_of(session.client_data(self._owner.client).examples)
        return hashlib.sha256(repr((self._data_digest, sorted(asked.items()), sorted(installed.items()))).encode()).hexdigest()

    def _open(self, config: Config) -> Session:
        begun, session = time.perf_counter(), open_session(config)
        if session is not self._session:
            self._session, self._loads, self._data_digest = session, self._loads + 1, b""
            log.info("base model loaded (%d since the start), %.2f s", self._loads, time.perf_counter() - begun)
        return session

    def _num_examples(self, session: Session) -> int:
        return len(session.client_data(self._owner.client).examples)

    def _join_reply(self, session: Session) -> RecordDict:
        member = Member(self._owner.client, self._num_examples(session), session.base_digest, fedsim.__version__, self._owner.shard)
        return member.to_records()


def digest_of(examples: Sequence[AnyEncoded]) -> bytes:
    """Returns the SHA-256 digest of encoded examples in their order; takes microseconds per example."""
    hashed = hashlib.sha256()
    for example in examples:
        for field in dataclasses.fields(example):
            value = np.asarray(getattr(example, field.name))
            hashed.update(f"{field.name} {value.dtype} {value.shape}/".encode() + value.tobytes())
    return hashed.digest()

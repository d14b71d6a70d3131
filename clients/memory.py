"""A client's files: its state in each experiment, its last noised answers, and the privacy that it has spent.

Flower loses the state of a Context when a SuperNode restarts; here every message's outcome is on disk before its reply leaves.
"""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from clients.framing import FrameError, read_records, write_records
from clients.owner import Owner, RefusedError
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.files import atomic_write, atomic_write_json
from fedsim.plain import affecting_results, to_dict
from fedsim.privacy.accounting import Mechanism, default_delta
from fedsim.privacy.ledger import PrivacyLedger

log = logging.getLogger("fedsim.worker")


def experiment_key(config: Config) -> str:
    """Returns an experiment's name: the digest of all options that can change its result, so a resumed run finds its clients' state."""
    return hashlib.sha256(json.dumps(affecting_results(to_dict(config)), sort_keys=True).encode()).hexdigest()[:24]


class ContextStore:
    """Stores the state of Flower's Context of each experiment in its own file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self, key: str) -> RecordDict:
        """Returns the state saved last, empty if there is none; a damaged file is set aside."""
        path = self._folder / f"{key}.state"
        if not path.exists():
            return RecordDict()
        try:
            content = path.read_bytes()  # of any size: the owner's limit is for messages
            return read_records(io.BytesIO(content).read, len(content))
        except (FrameError, EOFError) as error:
            path.rename(path.with_suffix(".damaged"))
            log.error("memory %s is damaged and set aside: %s", key, error)
            return RecordDict()

    def save(self, key: str, state: RecordDict) -> None:
        """Saves the state, durably also across a power cut."""
        path = self._folder / f"{key}.state"
        if not state and not path.exists():
            return
        buffer = io.BytesIO()
        write_records(buffer.write, state)
        atomic_write(path, buffer.getvalue(), mode=0o600)


class Answers:
    """The last noised answer of each kind in each experiment: a repeated request gets the identical answer at no further cost.

    Any other request gets fresh noise. Training again with the same noise would leak: GPU runs are not bit-identical, and free memory
    decides how examples are packed, so the difference of two such answers would contain no noise.
    """

    RECORD, DIGEST = "answers", "digest"

    def __init__(self, folder: Path) -> None:
        self._store = ContextStore(folder)

    def said(self, kind: str, digest: str) -> RecordDict | None:
        """Returns the answer to the request with this digest, None if it was not the last of its kind."""
        kept = self._store.load(kind)
        if self.RECORD not in kept.config_records or kept.config_records[self.RECORD][self.DIGEST] != digest:
            return None
        del kept[self.RECORD]
        return kept

    def keep(self, kind: str, digest: str, content: RecordDict) -> None:
        """Saves the last answer of its kind, durably also across a power cut."""
        self._store.save(kind, RecordDict({**content, self.RECORD: ConfigRecord({self.DIGEST: digest})}))


UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, UserError)
"""Errors that reading a damaged file of the accountant may raise."""


class Budget:
    """The client's own accountant, over all runs that it ever joins; nothing spent is ever refunded."""

    def __init__(self, path: Path, owner: Owner) -> None:
        """Raises UserError if the file is not an accountant's: the spent epsilon is then unknown, and nothing may leave the client."""
        self._path, self._owner = path, owner
        try:
            self._ledger = PrivacyLedger.from_json(_renumbered(json.loads(path.read_bytes()), owner.client)) if path.exists() else None
        except UNREADABLE as error:
            raise UserError(
                f"{path}: expected what the accountant of client {owner.client} has written, got something else ({type(error).__name__}). "
                "Restore it from a backup: without it the spent epsilon is unknown."
            ) from error

    def check(self, mechanism: Mechanism, num_examples: int) -> None:
        """Raises RefusedError if the mechanism would raise the client's epsilon above its owner's limit."""
        ledger = self._current_ledger(num_examples)
        if ledger.would_exceed(self._owner.client, mechanism):
            raise RefusedError(
                f"epsilon would exceed the owner's {self._owner.max_epsilon:g}; {ledger.epsilon(self._owner.client):.4g} is spent"
            )

    def charge(self, mechanism: Mechanism, num_examples: int) -> None:
        """Records on disk the mechanism of an answer that is about to leave the client."""
        ledger = self._current_ledger(num_examples)
        ledger.charge(self._owner.client, mechanism)
        atomic_write_json(self._path, ledger.to_json(), mode=0o600)
        self._ledger = ledger

    def _current_ledger(self, num_examples: int) -> PrivacyLedger:
        """Returns the ledger with the owner's current limit and delta; a delta derived from the number of examples only shrinks."""
        client, delta = self._owner.client, self._owner.delta or default_delta(num_examples)
        ledger = self._ledger or PrivacyLedger("example", {client: delta})
        ledger.set_delta(client, delta if self._owner.delta else min(delta, ledger.delta(client)))
        ledger.budget = self._owner.max_epsilon
        return ledger


def _renumbered(ledger: dict[str, Any], client: int) -> dict[str, Any]:
    """Returns the ledger with its history under the client's current number: past spending counts under any former number."""
    return ledger | {"clients": [[client, *history] for _, *history in ledger["clients"]]}

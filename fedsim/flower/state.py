"""The whole state of a run, and its form in a checkpoint: tensors grouped by part, everything else as plain values.

Local state of clients in this process is in the Contexts of their nodes, and in the checkpoint next to the server's state.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context
from torch import Tensor

from fedsim.checkpoints import NO_BASES, Bases, Checkpoint
from fedsim.core.communication import CommunicationLedger
from fedsim.core.fedbuff import Buffer
from fedsim.core.global_state import GlobalState
from fedsim.core.missing import Missing, count_by_reason
from fedsim.errors import UserError
from fedsim.flower.facts import RoundFacts
from fedsim.flower.worker import Accepted, read_memory, write_memory
from fedsim.local_round import Memory
from fedsim.privacy.ledger import PrivacyLedger
from fedsim.session import Session

FACTOR, FOLDED, INCREMENT, MOMENT, CONTROL_VARIATE, MEMORY = "factor", "folded", "increment", "moment", "control", "memory"
BUFFER = "buffer"
"""Prefixes of tensor names in a checkpoint."""

FORMAT = 2
"""Format of a checkpoint's facts; no other format can be read."""


@dataclass
class State:
    """The whole state of a run after `round`. `evaluations` is {round: {task: {accuracy, loss, num_examples, num_cut_off}}}."""

    round: int
    shared: GlobalState
    ledger: CommunicationLedger = field(default_factory=CommunicationLedger)
    privacy: PrivacyLedger | None = None
    evaluations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    num_tokens: int = 0
    missing: dict[str, int] = field(default_factory=dict)  # requested replies that did not count, by reason
    wall_seconds: float = 0.0  # of rounds: messages, local training and aggregation
    simulated_seconds: float = 0.0  # of the whole run, on a simulated network

    def count(self, facts: RoundFacts, wall_seconds: float) -> None:
        """Adds the totals of the next round; `shared` and the ledgers hold the rest already."""
        self.round += 1
        self.num_tokens += facts.num_tokens
        self.wall_seconds += wall_seconds
        self.simulated_seconds += facts.simulated_seconds or 0.0
        self.count_missing(facts.missing)

    def count_missing(self, missing: Iterable[Missing]) -> None:
        """Adds requested replies that did not count."""
        self.missing = dict(Counter(self.missing) + Counter(count_by_reason(missing)))


def checkpoint_of(
    state: State, memories: dict[str, Tensor], tokens_per_pass: int, moving: Collection[str], labels: Sequence[str]
) -> Checkpoint:
    """Returns the checkpoint from which `restored` recovers this state; `memories` come from `memories_in`.

    `moving` are the kinds of factors that change between rounds; `labels` are the data's, if it is classified.
    """
    shared, exchange = state.shared, state.shared.exchange
    facts = {
        "format": FORMAT,
        "labels": [*labels],
        "adapter_digest": shared.adapter_digest(),
        "versions": exchange.versions,
        "needed": exchange.needed,
        "held": {client: [held.get(part, -1) for part in exchange.versions] for client, held in exchange.held.items()},
        "tag": shared.tag,
        "increment_on": shared.increment_on,
        "clip_norm": shared.clip_norm,
        "tokens_per_pass": tokens_per_pass,
        "accepted": shared.accepted,
        "ledger": state.ledger.to_json(),
        "privacy": state.privacy.to_json() if state.privacy else None,
        "evaluations": state.evaluations,
        "num_tokens": state.num_tokens,
        "missing": state.missing,
        "wall_seconds": state.wall_seconds,
        "simulated_seconds": state.simulated_seconds,
        "buffer": shared.buffer.to_json(),
    }
    tensors = {
        FACTOR: shared.factors,
        FOLDED: shared.folded,
        INCREMENT: shared.increment,
        MOMENT: shared.moments,
        CONTROL_VARIATE: {} if shared.control is None else {"c": shared.control},
        MEMORY: memories,
        BUFFER: shared.buffer.changes(),
    }
    flat = {f"{first}/{name}": tensor for first, group in tensors.items() for name, tensor in group.items()}
    return Checkpoint(state.round, flat, facts, _bases(shared, moving))


def _bases(shared: GlobalState, moving: Collection[str]) -> Bases:
    """Returns the names and digest of the factors that do not change between rounds."""
    kinds = [kind for kind in shared.spec.kinds if kind not in moving]
    text = " ".join(f"{kind} {shared.digest(kind)}" for kind in kinds)
    names = frozenset(f"{FACTOR}/{name}" for name in shared.spec.pick(shared.factors, kinds))
    return Bases(names, hashlib.sha256(text.encode()).hexdigest()) if names else NO_BASES


def restored(checkpoint: Checkpoint, session: Session, contexts: Mapping[int, Context]) -> State:
    """Returns the state of a checkpoint, and puts the local state of clients in this process back into their nodes' Contexts.

    Raises UserError for a checkpoint of another format, if the data's labels have changed, or if clients' local state has no Context to
    go to, and ValueError if the factors do not match the digest in the checkpoint.
    """
    facts, tensors = checkpoint.state, _by_first_part(checkpoint.tensors)
    if facts.get("format", 1) != FORMAT:
        raise UserError(
            f"Expected a checkpoint of format {FORMAT}, got format {facts.get('format', 1)}, which another version of fedsim has written. "
            "Continue with that version, or start again with overwrite=true."
        )
    if (before := facts.get("labels", [])) != (labels := [*session.data.labels]):
        raise UserError(
            f"Expected data with the labels with which the run was begun, {', '.join(before)}, got {', '.join(labels)}. "
            "Restore the original data, or start again with overwrite=true."
        )
    shared = _shared(session.initial_state(tensors[FACTOR]), facts, tensors)
    nodes = sorted(contexts)
    for client, own in _by_client(tensors[MEMORY]).items():
        if not nodes:
            raise UserError("Expected to go on in one process or on Ray, where clients' memories are kept with the run. Use `fedsim run`.")
        context = contexts[nodes[client % len(nodes)]]  # as in `Asking.cohorts`, whatever the number of nodes was
        write_memory(context, {client: own}, shared.accepted[client], shared.accepted)
    if facts["adapter_digest"] != shared.adapter_digest():
        raise ValueError(f"Expected a state with digest {facts['adapter_digest'][:16]}..., got {shared.adapter_digest()[:16]}....")
    return State(
        checkpoint.round,
        shared,
        CommunicationLedger.from_json(facts["ledger"]),
        PrivacyLedger.from_json(facts["privacy"]) if facts["privacy"] else None,
        {int(round_): tasks for round_, tasks in facts["evaluations"].items()},
        facts["num_tokens"],
        facts["missing"],
        facts["wall_seconds"],
        facts["simulated_seconds"],
    )


def memories_in(contexts: Mapping[int, Context], clients: Sequence[int], accepted: Accepted) -> dict[str, Tensor]:
    """Returns the local state of the clients in this process, by node/client/name."""
    memories = {node: read_memory(context, clients, accepted) for node, context in contexts.items()}
    return {
        f"{node}/{client}/{name}": tensor
        for node, memory in memories.items()
        for client, own in memory.items()
        for name, tensor in own.items()
    }


def _shared(shared: GlobalState, facts: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> GlobalState:
    exchange = shared.exchange
    exchange.versions, exchange.needed = facts["versions"], facts["needed"]
    exchange.held = {int(client): dict(zip(exchange.versions, held, strict=True)) for client, held in facts["held"].items()}
    shared.folded, shared.increment, shared.moments = tensors[FOLDED], tensors[INCREMENT], tensors[MOMENT]
    shared.tag, shared.increment_on = facts["tag"], facts["increment_on"]
    shared.accepted = {int(client): number for client, number in facts["accepted"].items()}
    shared.buffer = Buffer.from_json(facts["buffer"], tensors[BUFFER])
    shared.control, shared.clip_norm = tensors[CONTROL_VARIATE].get("c"), facts["clip_norm"]
    return shared


def _by_first_part(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups the tensors of a checkpoint by the prefix of their name; a group may be empty."""
    groups: dict[str, dict[str, Tensor]] = {first: {} for first in (FACTOR, FOLDED, INCREMENT, MOMENT, CONTROL_VARIATE, MEMORY, BUFFER)}
    for name, tensor in tensors.items():
        first, _, rest = name.partition("/")
        groups[first][rest] = tensor
    return groups


def _by_client(tensors: dict[str, Tensor]) -> Memory:
    """Groups tensors named node/client/name by client."""
    memory: Memory = {}
    for name, tensor in tensors.items():
        _, client, what = name.split("/")
        memory.setdefault(int(client), {})[what] = tensor
    return memory

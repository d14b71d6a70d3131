"""Maps the clients of a deployment to their nodes, and decides which take part.

Flower identifies a node only by a number, so every new node is asked once; it answers with its client (the partition-id of its
SuperNode), that client's number of examples, its version of fedsim and a digest of its base model. If the server knows for which client
a node's key was registered, the node cannot join as another.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedsim
from fedsim.choices import PrivacyUnit
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.flower.requests import REQUEST
from fedsim.plain import to_dict
from fedsim.session import Session

JOIN, MEMBER = "query.join", "member"
POLL_SECONDS = 0.5
NOBODY = -1
"""Stands for the client of a node that claims a client whose key belongs to another node."""

RecordEvent = Callable[..., None]
"""Records an event: its kind, and facts by name."""


@dataclass(frozen=True)
class Member:
    """What a client states about itself when it joins."""

    client: int
    num_examples: int
    base_digest: str
    version: str
    shard: bool  # it trains on its shard of the experiment's data, as in a simulation; otherwise on its own data

    def to_records(self) -> RecordDict:
        """Returns the content of the client's answer."""
        return RecordDict({MEMBER: ConfigRecord(asdict(self))})

    @classmethod
    def from_records(cls, content: RecordDict) -> "Member":
        """Inverts `to_records`. Raises ValueError for anything else."""
        record = content.config_records.get(MEMBER)
        kinds = {field.name: field.type for field in fields(cls)}
        if record is None or {name: type(value) for name, value in record.items()} != kinds or record["num_examples"] < 1:  # type: ignore[operator]
            raise ValueError(f"Expected an answer with {', '.join(kinds)}, got {record!r:.200}.")
        return cls(**record)  # type: ignore[arg-type]


class Roster:
    """Asks nodes to join and tracks their clients; nodes that leave or return are noticed before each round."""

    def __init__(self, grid: Grid, config: Config, registered: Callable[[], Mapping[int, int]] = dict) -> None:
        """`registered` returns, by node, the clients whose keys the SuperLink has admitted; it overrules what a node claims.

        It is called whenever nodes have answered. If it names neither a node nor the client that the node claims, the claim is accepted.
        """
        self._grid, self._config, self._read_registered = grid, config, registered
        self._registered: Mapping[int, int] = {}  # as last read
        self._text = json.dumps(to_dict(config))
        self._unanswered: dict[str, int] = {}  # nodes that have not answered yet, by message id
        self._members: dict[int, Member] = {}  # by node
        self._known: set[int] = set()  # connected nodes that have been asked
        self._refused: dict[int, tuple[str, int | None]] = {}  # by node: the reason, and its client if known
        self._absent: list[int] = []
        self._record: RecordEvent = lambda kind, **facts: None
        self._session: Session  # set by `wait_for_clients`
        self._started = False

    def wait_for_clients(self, session: Session, record: RecordEvent) -> None:
        """Waits up to `engine.wait_seconds` for the clients, and gives the session the sizes of their own data.

        Raises UserError if no client can take part. Clients that connect later join before the next round.
        """
        self._record, self._session = record, session
        clients = range(self._config.federation.clients)
        client_nodes = self._poll(clients)
        if not client_nodes:
            reasons = "; ".join(reason for reason, _ in self._refused.values()) or "no SuperNode is connected"
            raise UserError(f"Expected clients to join within engine.wait_seconds={self._config.engine.wait_seconds:g}, but: {reasons}.")
        self._report_sizes()

    def begin_round(self) -> None:
        """Updates the members, and gives the session the data sizes of new ones, before anything is planned or charged."""
        self._refresh()
        self._report_sizes()

    def client_nodes(self, clients: Sequence[int]) -> dict[int, int]:
        """Returns the node of each of the clients that is connected and takes part; if none is, waits for one."""
        self._refresh()
        found = self._connected(clients)
        if not found and clients:
            found = self._poll(clients, at_least=1)
        absent = [client for client in clients if client not in found]
        if absent and absent != self._absent:
            self._record("absent", clients=absent)
        self._absent = absent
        return found

    def _poll(self, clients: Sequence[int], at_least: int | None = None) -> dict[int, int]:
        """Polls until `at_least` of the clients (by default all) are connected, no more can join, or the wait time is over."""
        deadline = time.monotonic() + self._config.engine.wait_seconds
        while True:
            self._refresh()
            found = self._connected(clients)
            enough = len(found) >= (len(clients) if at_least is None else at_least)
            if enough or time.monotonic() > deadline or not (self._unanswered or self._may_still_join({*clients} - {*found})):
                return found
            time.sleep(POLL_SECONDS)

    def _may_still_join(self, missing: set[int]) -> bool:
        """Whether any of these clients may still join: not if each was refused, counting every unidentified refused node as one."""
        refused = [client for _, client in self._refused.values()]
        return len(missing.difference(refused)) > refused.count(None)

    def _connected(self, clients: Iterable[int]) -> dict[int, int]:
        nodes = {member.client: node for node, member in self._members.items() if self._matches_plan(member)}
        return {client: nodes[client] for client in clients if client in nodes}

    def _matches_plan(self, member: Member) -> bool:
        """Whether the noise plan matches this client's data size; a client that joins in mid-round may have to wait for the next."""
        private = self._config.privacy.unit is PrivacyUnit.example and self._started
        return not private or self._size_reported(member)

    def _report_sizes(self) -> None:
        """Gives the session the data sizes of new members, and refuses those whose data is too small for the promised privacy."""
        self._started = True
        new = {node: member for node, member in self._members.items() if not self._size_reported(member)}
        if not new or self._plan_error(new.values()) is None:
            return
        for node, member in new.items():  # finds those at fault, one by one only now because a plan takes seconds
            if (reason := self._plan_error([member])) is not None:
                del self._members[node]
                self._refuse(node, reason, member)

    def _size_reported(self, member: Member) -> bool:
        return member.shard or self._session.own_data.get(member.client) == member.num_examples

    def _plan_error(self, members: Iterable[Member]) -> str | None:
        """Gives the session the data sizes of these members. Returns None, or why no privacy plan exists, and then undoes it."""
        before = self._session.own_data
        self._session.set_own_data_sizes({**before, **{member.client: member.num_examples for member in members}})
        try:
            _ = self._session.privacy_plan
        except UserError as error:
            self._session.set_own_data_sizes(before)
            return str(error)
        return None

    def _refresh(self) -> None:
        """Forgets nodes that left, asks new ones to join, and handles the answers received so far."""
        present = set(self._grid.get_node_ids())
        for node in sorted(self._known - present):
            gone = self._members.pop(node, None)
            self._refused.pop(node, None)
            if gone is not None:
                self._record("left", client=gone.client, node=str(node))
        for node in sorted(present - self._known):
            request = RecordDict({REQUEST: ConfigRecord({"config": self._text})})
            for message_id in self._grid.push_messages([Message(request, node, JOIN)]):
                if message_id:  # Flower's Grid gives none if a message could not be sent: the next call tries again
                    self._unanswered[message_id] = node
                    self._known.add(node)
        self._known &= present
        self._unanswered = {message_id: node for message_id, node in self._unanswered.items() if node in present}
        while self._unanswered and (replies := list(self._grid.pull_messages(list(self._unanswered)))):
            self._registered = self._read_registered()
            for reply in replies:
                self._handle_answer(self._unanswered.pop(reply.metadata.reply_to_message_id), reply)

    def _handle_answer(self, node: int, reply: Message) -> None:
        reason, member = None, None
        if reply.has_error():
            reason = str(reply.error.reason)
        else:
            try:
                member = Member.from_records(reply.content)
                reason = self._rejection(node, member)
            except ValueError as error:
                reason = str(error)
        if reason is not None or member is None:
            self._refuse(node, str(reason), member)
            return
        self._members[node] = member
        facts = {"num_examples": member.num_examples, "version": member.version, "registered": node in self._registered}
        self._record("joined", client=member.client, node=str(node), **facts)

    def _refuse(self, node: int, reason: str, member: Member | None) -> None:
        claimed = None if member is None else member.client
        self._refused[node] = reason, self._registered.get(node, NOBODY if claimed in self._registered.values() else claimed)
        self._record("refused", node=str(node), reason=reason)

    def _rejection(self, node: int, member: Member) -> str | None:
        """Returns the reason why a client cannot take part, None if it can."""
        most = self._config.federation.max_examples
        if member.version != fedsim.__version__:
            return f"client {member.client} runs fedsim {member.version:.20}, the server {fedsim.__version__}: install the same"
        if member.num_examples > most:
            return f"client {member.client} reports {member.num_examples} examples, federation.max_examples is {most}"
        if not 0 <= member.client < self._config.federation.clients:
            return f"there is no client {member.client} among {self._config.federation.clients}"
        if self._registered.get(node) != member.client and (node in self._registered or member.client in self._registered.values()):
            holder = f"client {self._registered[node]}" if node in self._registered else "no client"
            return f"node {node} claims to be client {member.client}, but its key is registered for {holder}"
        if member.client in [other.client for other in self._members.values()]:
            return f"client {member.client} already has a node"
        if member.base_digest != self._session.base_digest:
            return f"client {member.client} has another base model, tokenizer or chat template than the server, or one text for two"
        return None

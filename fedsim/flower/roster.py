"""A deployment's clients: which node each has, and whether it takes part.

To Flower a node is a number that says nothing of who it is, so every new node is asked once; its answer names the client that it is
(the partition-id of its SuperNode), how much data that client has, its fedsim and a digest of its base model. Where the server knows for
which client a node's key was registered, a node is not believed to be another.
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
"""In place of the client that a node is: one that says it is a client whose key is another's."""

Tell = Callable[..., None]
"""Writes an event down: its kind, and facts by name."""


@dataclass(frozen=True)
class Member:
    """What a client says of itself when it joins."""

    client: int
    num_examples: int
    base_digest: str
    version: str
    shard: bool  # it trains on its shard of the experiment's data, as in a simulation; otherwise the data is its own

    def to_records(self) -> RecordDict:
        """Returns the content of the answer."""
        return RecordDict({MEMBER: ConfigRecord(asdict(self))})

    @classmethod
    def from_records(cls, content: RecordDict) -> "Member":
        """Returns what `to_records` was called on. Raises ValueError for anything else."""
        record = content.config_records.get(MEMBER)
        kinds = {field.name: field.type for field in fields(cls)}
        if record is None or {name: type(value) for name, value in record.items()} != kinds or record["num_examples"] < 1:  # type: ignore[operator]
            raise ValueError(f"Expected an answer with {', '.join(kinds)}, got {record!r:.200}.")
        return cls(**record)  # type: ignore[arg-type]


class Roster:
    """Asks nodes to join and remembers who they are; a node that is gone, or comes back, is noticed before each round."""

    def __init__(self, grid: Grid, config: Config, registered: Callable[[], Mapping[int, int]] = dict) -> None:
        """`registered` returns the clients whose keys the SuperLink has admitted, by node: they are believed, not what a node says it is.

        It is asked whenever nodes have answered; where it names neither a node nor the client that the node says it is, that is believed.
        """
        self._grid, self._config, self._read_registered = grid, config, registered
        self._registered: Mapping[int, int] = {}  # as it was read last
        self._text = json.dumps(to_dict(config))
        self._asked: dict[str, int] = {}  # nodes that have not answered yet, by message
        self._members: dict[int, Member] = {}  # by node
        self._known: set[int] = set()  # nodes that were asked in their present stay
        self._refused: dict[int, tuple[str, int | None]] = {}  # why a node does not take part, and the client that it is, if that is known
        self._absent: list[int] = []
        self._tell: Tell = lambda kind, **facts: None
        self._session: Session  # from `wait_for_clients` on
        self._mustered = False

    def wait_for_clients(self, session: Session, tell: Tell) -> None:
        """Waits for the clients, `engine.wait_seconds` at most, and tells the session how much data those have that bring their own.

        Raises UserError if none is there to take part. Who comes later joins before the next round.
        """
        self._tell, self._session = tell, session
        clients = range(self._config.federation.clients)
        client_nodes = self._waited_for(clients)
        if not client_nodes:
            reasons = "; ".join(reason for reason, _ in self._refused.values()) or "no SuperNode is connected"
            raise UserError(f"Expected clients to join within engine.wait_seconds={self._config.engine.wait_seconds:g}, but: {reasons}.")
        self._hear()

    def begin_round(self) -> None:
        """Notices who has come and gone, and tells the session how much data newcomers bring, before anything is planned or charged."""
        self._look()
        self._hear()

    def client_nodes(self, clients: Sequence[int]) -> dict[int, int]:
        """Returns the node of each of the clients that are connected and take part; if there is none, some are waited for."""
        self._look()
        found = self._at_home(clients)
        if not found and clients:
            found = self._waited_for(clients, at_least=1)
        absent = [client for client in clients if client not in found]
        if absent and absent != self._absent:
            self._tell("absent", clients=absent)
        self._absent = absent
        return found

    def _waited_for(self, clients: Sequence[int], at_least: int | None = None) -> dict[int, int]:
        """Looks again and again until so many of the clients, or all, are there, nobody is left to come, or the time is up."""
        ends = time.monotonic() + self._config.engine.wait_seconds
        while True:
            self._look()
            found = self._at_home(clients)
            enough = len(found) >= (len(clients) if at_least is None else at_least)
            if enough or time.monotonic() > ends or not (self._asked or self._to_come({*clients} - {*found})):
                return found
            time.sleep(POLL_SECONDS)

    def _to_come(self, missing: set[int]) -> bool:
        """Whether any of these clients may still come: not where each was refused, as far as it is known who was."""
        refused = [client for _, client in self._refused.values()]
        return len(missing.difference(refused)) > refused.count(None)

    def _at_home(self, clients: Iterable[int]) -> dict[int, int]:
        nodes = {member.client: node for node, member in self._members.items() if self._planned_for(member)}
        return {client: nodes[client] for client in clients if client in nodes}

    def _planned_for(self, member: Member) -> bool:
        """Whether the noise of this client was planned for as much data as it has; who comes in mid-round may have to wait for the next."""
        private = self._config.privacy.unit is PrivacyUnit.example and self._mustered
        return not private or self._heard_of(member)

    def _hear(self) -> None:
        """Tells the session the sizes of data of the clients' own. Who brings too little for the privacy that is promised is refused."""
        self._mustered = True
        new = {node: member for node, member in self._members.items() if not self._heard_of(member)}
        if not new or self._unplannable(new.values()) is None:
            return
        for node, member in new.items():  # whose fault it is; a plan takes seconds, so this is not where to begin
            if (reason := self._unplannable([member])) is not None:
                del self._members[node]
                self._refuse(node, reason, member)

    def _heard_of(self, member: Member) -> bool:
        return member.shard or self._session.own_data.get(member.client) == member.num_examples

    def _unplannable(self, members: Iterable[Member]) -> str | None:
        """Tells the session the sizes of these. Returns None, or why no privacy can be planned for them, and then nothing is told."""
        before = self._session.own_data
        self._session.hear({**before, **{member.client: member.num_examples for member in members}})
        try:
            _ = self._session.privacy_plan
        except UserError as error:
            self._session.hear(before)
            return str(error)
        return None

    def _look(self) -> None:
        """Forgets nodes that are gone, asks those that have come, and takes the answers that are there."""
        present = set(self._grid.get_node_ids())
        for node in sorted(self._known - present):
            gone = self._members.pop(node, None)
            self._refused.pop(node, None)
            if gone is not None:
                self._tell("left", client=gone.client, node=str(node))
        for node in sorted(present - self._known):
            request = RecordDict({REQUEST: ConfigRecord({"config": self._text})})
            for message_id in self._grid.push_messages([Message(request, node, JOIN)]):
                if message_id:  # Flower's Grid gives none where a message could not be sent: it is asked at the next look
                    self._asked[message_id] = node
                    self._known.add(node)
        self._known &= present
        self._asked = {message_id: node for message_id, node in self._asked.items() if node in present}
        while self._asked and (replies := list(self._grid.pull_messages(list(self._asked)))):
            self._registered = self._read_registered()
            for reply in replies:
                self._answered(self._asked.pop(reply.metadata.reply_to_message_id), reply)

    def _answered(self, node: int, reply: Message) -> None:
        reason, member = None, None
        if reply.has_error():
            reason = str(reply.error.reason)
        else:
            try:
                member = Member.from_records(reply.content)
                reason = self._unfit(node, member)
            except ValueError as error:
                reason = str(error)
        if reason is not None or member is None:
            self._refuse(node, str(reason), member)
            return
        self._members[node] = member
        facts = {"num_examples": member.num_examples, "version": member.version, "registered": node in self._registered}
        self._tell("joined", client=member.client, node=str(node), **facts)

    def _refuse(self, node: int, reason: str, member: Member | None) -> None:
        said = None if member is None else member.client
        self._refused[node] = reason, self._registered.get(node, NOBODY if said in self._registered.values() else said)
        self._tell("refused", node=str(node), reason=reason)

    def _unfit(self, node: int, member: Member) -> str | None:
        """Returns why a client cannot take part, None if it can."""
        most = self._config.federation.max_examples
        if member.version != fedsim.__version__:
            return f"client {member.client} runs fedsim {member.version:.20}, the server {fedsim.__version__}: install the same"
        if member.num_examples > most:
            return f"client {member.client} tells of {member.num_examples} examples, federation.max_examples is {most}"
        if not 0 <= member.client < self._config.federation.clients:
            return f"there is no client {member.client} among {self._config.federation.clients}"
        if self._registered.get(node) != member.client and (node in self._registered or member.client in self._registered.values()):
            holder = f"client {self._registered[node]}" if node in self._registered else "no client"
            return f"node {node} says that it is client {member.client}, but its key is registered for {holder}"
        if member.client in [other.client for other in self._members.values()]:
            return f"client {member.client} has another node already"
        if member.base_digest != self._session.base_digest:
            return f"client {member.client} has another base model, tokenizer or chat template than the server, or one text for two"
        return None

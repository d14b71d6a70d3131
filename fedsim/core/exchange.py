"""Tracks which version of each part of the global state every client holds, and so what a message to it must carry.

Parts are the kinds of factors, "W" (everything added to the base weights so far) and "c" (SCAFFOLD's server control variate). A run and
the command that predicts its cost use the same class, so they cannot disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

WEIGHTS, CONTROL = "W", "c"


@dataclass
class Exchange:
    """The version of a part is the round in which it last changed.

    Clients can derive some parts from seed and base model, and so hold them: the `derived` parts at version 0, the `rederived` ones at
    every version.
    """

    versions: dict[str, int]
    derived: frozenset[str]
    rederived: frozenset[str] = frozenset()
    held: dict[int, dict[str, int]] = field(default_factory=dict)  # by client
    needed: dict[str, int] = field(default_factory=dict)  # versions that a client must hold to apply the last increment of W

    def holds(self, client: int, part: str) -> int:
        """Returns the version of the part that the client holds, -1 for none."""
        if part in self.rederived:
            return self.versions[part]
        return self.held.get(client, {}).get(part, 0 if part in self.derived else -1)

    def lacking(self, client: int) -> list[str]:
        """Returns the parts of which the client lacks the current version, in order."""
        return [part for part, version in self.versions.items() if self.holds(client, part) < version]

    def takes_increment(self, client: int) -> bool:
        """Whether the client holds what the last increment of W builds on; otherwise it needs all of W."""
        return bool(self.needed) and all(
            part in self.rederived or self.holds(client, part) == version for part, version in self.needed.items()
        )

    def sent(self, client: int, parts: Iterable[str]) -> None:
        """Records that the client now holds the current version of these parts.

        To be called once its reply has arrived: until then the message may be lost.
        """
        held = {part: self.holds(client, part) for part in self.versions}
        self.held[client] = held | {part: self.versions[part] for part in parts}

    def changed(self, parts: Iterable[str], round: int) -> None:
        """Records that the parts changed in this round."""
        self.versions.update(dict.fromkeys(parts, round))

    def added(self, round: int, builds_on: Iterable[str] | None) -> None:
        """Records that W changed; its increment suits clients that hold the previous W and the current version of the parts `builds_on`."""
        self.needed = {} if builds_on is None else {part: self.versions[part] for part in (WEIGHTS, *builds_on)}
        self.versions[WEIGHTS] = round

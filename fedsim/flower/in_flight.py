"""What was charged after the checkpoint from which a deployment goes on: its clients may have answered before the server died.

A client that is asked the same again answers with the same noise, which costs nothing more. Where the request is another one, because
other clients are there or one has other data, there are two answers, and both are charged.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger

CHARGED = "charged"
"""Kind of the audit log's lines of what privacy costs."""
GRADIENT, TRAINING = "initial gradient", "training"
"""What clients are asked for."""


def told(mechanisms: Mapping[int, Mechanism]) -> dict[str, Any]:
    """Returns what the audit log says of the mechanisms that clients are charged for: clients with the same one are named together."""
    alike: dict[Mechanism, list[int]] = {}
    for client, each in mechanisms.items():
        alike.setdefault(each, []).append(client)
    return {"clients": [*mechanisms], "mechanisms": [{**vars(each), "clients": clients} for each, clients in alike.items()]}


class InFlight:
    """Charges that have no checkpoint yet, out of the lines of an audit log that a resumption supersedes."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._left: dict[tuple[str, int], set[tuple[int, Mechanism]]] = {}
        for line in lines:
            for each in line.get("mechanisms", ()) if line.get("kind") == CHARGED else ():
                mechanism = Mechanism(each["noise_multiplier"], each["sampling_rate"], each["steps"], each["name"])
                self._left.setdefault((line["what"], line["round"]), set()).update((client, mechanism) for client in each["clients"])

    def settle(self, ledger: PrivacyLedger, what: str, number: int, again: Mapping[int, Mechanism]) -> None:
        """Charges what was asked for in a round and differs from what is asked `again`; what is the same waits for the next call."""
        left = self._left.pop((what, number), set())
        same = {(client, mechanism) for client, mechanism in left if again.get(client) == mechanism}
        for client, mechanism in sorted(left - same, key=lambda each: each[0]):
            ledger.charge(client, mechanism)
        if same:
            self._left[what, number] = same

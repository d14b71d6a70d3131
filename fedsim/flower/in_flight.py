"""What a deployment was charged after the checkpoint from which it goes on: its clients may have answered before the server died.

A client that is asked the same again sends its kept answer, which costs nothing more. Where the request is another one, because
the global state is another, other clients are there or one has more data, there are two answers, and both are charged. That a client has
other data of the same size only its own accountant can know, which counts every answer. Behind masks a round is unmasked over the same
clients or not at all (`fedsim.flower.secure_worker`), but with privacy=example the request names what those who came have.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger

CHARGED = "charged"
"""Kind of the audit log's lines of what privacy costs."""
GRADIENT, TRAINING = "initial gradient", "training"
"""What clients are asked for."""


def charge_line(what: str, number: int, adapter_digest: str, mechanisms: Mapping[int, Mechanism]) -> dict[str, Any]:
    """Returns what the audit log says of a round's charges; clients with the same mechanism are named together."""
    alike: dict[Mechanism, list[int]] = {}
    for client, each in mechanisms.items():
        alike.setdefault(each, []).append(client)
    told = [{**vars(each), "clients": clients} for each, clients in alike.items()]
    return {"round": number, "what": what, "adapter_digest": adapter_digest, "clients": [*mechanisms], "mechanisms": told}


class InFlight:
    """Charges that have no checkpoint yet, out of the lines of an audit log that a resumption supersedes."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._rounds: dict[tuple[str, int, str], dict[tuple[int, Mechanism], None]] = {}  # the keys are what was charged, in order
        for line in lines:
            if line.get("kind") != CHARGED or "mechanisms" not in line:
                continue
            charged = self._rounds.setdefault((line["what"], line["round"], line["adapter_digest"]), {})
            for each in line["mechanisms"]:
                mechanism = Mechanism(each["noise_multiplier"], each["sampling_rate"], each["steps"], each["name"])
                charged |= dict.fromkeys((client, mechanism) for client in each["clients"])

    def charge(self, ledger: PrivacyLedger) -> list[dict[str, Any]]:
        """Charges all of it, what was asked several times in the same words once, and returns the lines that say so in the audit log."""
        lines = []
        for (what, number, digest), charged in self._rounds.items():
            for client, mechanism in charged:
                ledger.charge(client, mechanism)
                lines.append(charge_line(what, number, digest, {client: mechanism}))
        return lines

    def concerns(self, what: str, number: int) -> bool:
        """Whether anything of this kind was asked for in the round, so that it pays to know the digest of the global state."""
        return any(key[:2] == (what, number) for key in self._rounds)

    def covers(self, what: str, number: int, adapter_digest: str, client: int, mechanism: Mechanism) -> bool:
        """Whether the client was charged for this very request: it costs nothing more."""
        return (client, mechanism) in self._rounds.get((what, number, adapter_digest), {})

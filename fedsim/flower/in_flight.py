"""Privacy charges made after the checkpoint from which a deployment resumes: clients may have answered before the server died.

A client that is asked the same again sends its stored answer, the last of its kind, which costs nothing more. Any other request is answered
with fresh noise and both are charged, as is every request under secure aggregation, whose answers are not stored. If a client now has
other data of the same size, and so gives another answer, only its own accountant can know.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger

CHARGED = "charged"
"""Kind of the audit log's lines that record privacy costs."""
BEFORE = "before"
"""Marks lines that repeat earlier lines after a resumption."""
GRADIENT, TRAINING = "initial gradient", "training"
"""Kinds of requests that are charged."""


def charge_line(what: str, number: int, adapter_digest: str, mechanisms: Mapping[int, Mechanism]) -> dict[str, Any]:
    """Returns the audit log's line for a round's charges; clients with the same mechanism share an entry."""
    alike: dict[Mechanism, list[int]] = {}
    for client, each in mechanisms.items():
        alike.setdefault(each, []).append(client)
    entries = [{**vars(each), "clients": clients} for each, clients in alike.items()]
    return {"round": number, "what": what, "adapter_digest": adapter_digest, "clients": [*mechanisms], "mechanisms": entries}


class InFlight:
    """Charges not in the checkpoint yet, from the lines of the audit log that a resumption supersedes."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._charges: list[tuple[str, int, str, int, Mechanism]] = []  # kind of request, round, adapter digest, client, mechanism
        for line in lines:
            if line.get("kind") != CHARGED or line.get(BEFORE) or "mechanisms" not in line:
                continue
            for each in line["mechanisms"]:
                mechanism = Mechanism(each["noise_multiplier"], each["sampling_rate"], each["steps"], each["name"])
                request = line["what"], line["round"], line["adapter_digest"]
                self._charges += [(*request, client, mechanism) for client in each["clients"]]
        self._last = {(what, client): (number, digest, mechanism) for what, number, digest, client, mechanism in self._charges}

    def charge(self, ledger: PrivacyLedger) -> list[dict[str, Any]]:
        """Charges everything to the ledger and returns the lines for the audit log."""
        for *_, client, mechanism in self._charges:
            ledger.charge(client, mechanism)
        entries = [charge_line(what, number, digest, {client: each}) for what, number, digest, client, each in self._charges]
        return [{**line, BEFORE: True} for line in entries]

    def concerns(self, what: str, number: int) -> bool:
        """Whether any request of this kind was charged in the round, so that computing the digest of the adapter is worthwhile."""
        return any(each[:2] == (what, number) for each in self._charges)

    def covers(self, what: str, number: int, adapter_digest: str, client: int, mechanism: Mechanism) -> bool:
        """Whether this very request is the last of its kind the client was charged for: it sends its stored answer at no further cost."""
        return self._last.get((what, client)) == (number, adapter_digest, mechanism)

"""A client's missing reply, in one form for every reason."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Reason(Enum):
    """Why the server continues without a client."""

    timeout = "no reply within the deadline"
    died = "its worker failed or disconnected"
    refused_by_client = "its owner declined"
    refused_by_server = "its upload is invalid"
    dropped_out = "it left during the round"


@dataclass(frozen=True)
class Missing:
    """A client that was selected for a round but is not in its result; the weights of the others sum to one."""

    client: int
    round: int
    reason: Reason
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns {client, reason, detail}, as in the round's event."""
        return {"client": self.client, "reason": self.reason.name, "detail": self.detail}


def count_by_reason(missing: Iterable[Missing]) -> dict[str, int]:
    """Returns how many are missing for each reason, in the order of `Reason`, without zeros."""
    counts = Counter(each.reason for each in missing)
    return {reason.name: counts[reason] for reason in Reason if counts[reason]}


def reasons_text(counts: dict[str, int]) -> str:
    """Returns counts by reason as "1 timeout, 1 dropped out"."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def missing_text(counts: dict[str, int]) -> str:
    """Returns "2 missing (1 timeout, 1 dropped out)", or "" if nobody is missing."""
    return f"{sum(counts.values())} missing ({reasons_text(counts)})" if counts else ""

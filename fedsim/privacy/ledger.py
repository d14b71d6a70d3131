"""The privacy ledger: records every release of each client's private data and adds up its cost.

A published epsilon often omits the initialisation, or covers one client. The ledger records every release with the client whose data
it used, and reports the worst client's total. No entry is ever removed: a resumed run continues the ledger.
"""

import statistics
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from fedsim.errors import UserError
from fedsim.privacy.accounting import INITIALIZATION, History, Mechanism, check_accountant, epsilon, exceeds, extended

UNITS = ("example", "client")


class PrivacyLedger:
    """One history of mechanisms for each client in `deltas`; `budget` is the epsilon that none may exceed, None for no limit.

    Charge a mechanism before its result leaves the client: an interrupted run forgets what it released but did not charge.
    Clients with equal histories and deltas are computed once per process (see `accounting.epsilon`).
    """

    def __init__(self, unit: str, deltas: Mapping[int, float], accountant: str = "prv", budget: float | None = None) -> None:
        check_accountant(accountant)
        if unit not in UNITS:
            raise UserError(f"Expected a unit of privacy among {', '.join(UNITS)}, got {unit!r}.")
        if budget is not None and not budget > 0:
            raise UserError(f"Expected a privacy budget above 0 or none, got {budget}.")
        if wrong := {client: delta for client, delta in deltas.items() if not 0 < delta < 1}:
            raise UserError(f"Expected 0 < delta < 1 for every client, got {wrong}.")
        self.unit, self.accountant, self.budget = unit, accountant, budget
        self._deltas = dict(sorted(deltas.items()))
        self._histories: dict[int, History] = dict.fromkeys(self._deltas, ())

    def charge(self, client: int, mechanism: Mechanism, delta: float | None = None) -> None:
        """Records a mechanism, even above the budget: ask `would_exceed` before spending. Raises KeyError for an unknown client.

        `delta` belongs to the client's current data; if it is smaller than before, all of the client's epsilon holds at it from now on.
        """
        if delta is not None:
            self.set_delta(client, min(delta, self._deltas[client]))
        self._histories[client] = extended(self._histories[client], mechanism)

    def delta(self, client: int) -> float:
        """Returns the delta at which the client's epsilon holds."""
        return self._deltas[client]

    def set_delta(self, client: int, delta: float) -> None:
        """Reports all of the client's epsilon at this delta from now on; past releases do not depend on it."""
        self._deltas[client] = delta

    def history(self, client: int) -> History:
        """Returns all mechanisms charged to the client, in order, with consecutive equal ones merged."""
        return self._histories[client]

    def epsilon(self, client: int, name: str | None = None) -> float:
        """Returns the client's epsilon over all mechanisms, or over those of one name as if there were no others."""
        chosen = [mechanism for mechanism in self._histories[client] if name in (None, mechanism.name)]
        return epsilon(chosen, self._deltas[client], self.accountant)

    def largest_epsilon(self) -> float:
        """Returns the largest epsilon of a client; clients with equal histories and deltas are computed once."""
        kinds = {(self._histories[client], delta): client for client, delta in self._deltas.items()}
        return max(self.epsilon(client) for client in kinds.values())

    def would_exceed(self, client: int, mechanism: Mechanism, delta: float | None = None) -> bool:
        """Returns whether the client's epsilon would be above the budget after the mechanism, `delta` as in `charge`. Changes nothing."""
        if self.budget is None:
            return False
        held_at = self._deltas[client] if delta is None else min(delta, self._deltas[client])
        return exceeds(extended(self._histories[client], mechanism), self.budget, held_at, self.accountant)

    def summary(self) -> dict[str, Any]:
        """Returns plain values for summary.json: `epsilon`, `initialization_epsilon` and `delta` are maxima over clients.

        An infinite epsilon stays a float. Takes up to a second for each distinct client not computed before.
        """
        clients = [self._of_client(client) for client in self._deltas]
        spent = [row["epsilon"] for row in clients]
        return {
            "unit": self.unit,
            "epsilon": max(spent, default=0.0),
            "delta": max(self._deltas.values(), default=0.0),
            "accountant": self.accountant,
            "budget": self.budget,
            "initialization_epsilon": max((row["initialization_epsilon"] for row in clients), default=0.0),
            "distribution": {"min": min(spent), "median": statistics.median(spent), "max": max(spent)} if spent else None,
            "per_client": clients,
        }

    def _of_client(self, client: int) -> dict[str, Any]:
        return {
            "client": client,
            "epsilon": self.epsilon(client),
            "delta": self._deltas[client],
            "initialization_epsilon": self.epsilon(client, INITIALIZATION),
            "mechanisms": [vars(mechanism).copy() for mechanism in self._histories[client]],
        }

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint; lossless."""
        clients = [[client, delta, [list(astuple(m)) for m in self._histories[client]]] for client, delta in self._deltas.items()]
        return {"unit": self.unit, "accountant": self.accountant, "budget": self.budget, "clients": clients}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PrivacyLedger":
        """Returns the ledger that `to_json` saved. Raises ValueError or UserError for values that no ledger holds."""
        deltas = {client: delta for client, delta, _ in value["clients"]}
        ledger = cls(value["unit"], deltas, value["accountant"], value["budget"])
        for client, _, mechanisms in value["clients"]:
            for fields in mechanisms:
                ledger.charge(client, Mechanism(*fields))
        return ledger

"""The facts of a round: the clients in its result with their weights, the missing ones with reasons, and what clients reported."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import nan
from typing import Any

from fedsim.core.missing import Missing, Reason


@dataclass
class RoundFacts:
    """Facts of one round, filled as replies arrive; lists are in order of arrival."""

    clients: list[int] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # used in the average, before normalisation
    missing: list[Missing] = field(default_factory=list)
    num_tokens: int = 0
    num_within: int = 0  # clients whose update was within the clip norm
    staleness: list[int] = field(default_factory=list)  # fedbuff: how many versions each update was behind
    simulated_seconds: float | None = None  # duration of the round on the simulated network
    secure: dict[str, Any] = field(default_factory=dict)  # facts of secure aggregation
    num_clipped: int = 0  # clients whose update was scaled down to server.max_update_norm
    num_attempts: int = 1  # how often clients were asked before enough replied
    diagnosis: dict[str, Any] = field(default_factory=dict)

    def add_unreported(self, asked: Iterable[int], server_round: int) -> None:
        """Records as missing the asked clients that are neither in the result nor missing yet."""
        known = {*self.clients, *(each.client for each in self.missing)}
        detail = "not connected, or its turn did not come in time"
        self.missing += [Missing(client, server_round, Reason.died, detail) for client in asked if client not in known]

    @property
    def shares(self) -> list[float]:
        """The clients' weights p_i, which sum to one."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def mean_loss(self) -> float:
        """Training loss averaged over the clients by their number of examples."""
        if not self.clients:
            return nan
        return sum(n * loss for n, loss in zip(self.num_examples, self.loss, strict=True)) / sum(self.num_examples)

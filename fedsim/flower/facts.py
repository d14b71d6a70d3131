"""The facts of a round: who is in its result and with what weight, who is missing and why, and what the clients reported."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import nan
from typing import Any

from fedsim.core.missing import Missing, Reason


@dataclass
class RoundFacts:
    """Facts of one round, filled as replies come; lists run in the order of arrival."""

    clients: list[int] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # as used in the average, before normalisation
    missing: list[Missing] = field(default_factory=list)
    num_tokens: int = 0
    num_within: int = 0  # clients whose update was within the clip norm
    staleness: list[int] = field(default_factory=list)  # fedbuff: versions that each update was behind
    simulated_seconds: float | None = None  # what the round took on the simulated network
    secure: dict[str, Any] = field(default_factory=dict)  # what secure aggregation tells of the round
    num_clipped: int = 0  # clients whose update was scaled down to server.max_update_norm
    num_attempts: int = 1  # how often clients were asked until enough had replied
    diagnosis: dict[str, Any] = field(default_factory=dict)

    def miss_untold(self, asked: Iterable[int], server_round: int) -> None:
        """Records as missing those asked clients of which nothing is known."""
        told = {*self.clients, *(each.client for each in self.missing)}
        detail = "not connected, or its turn did not come in time"
        self.missing += [Missing(client, server_round, Reason.died, detail) for client in asked if client not in told]

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

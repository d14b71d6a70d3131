"""Privacy audit of a whole run: canaries in the clients' data, an observer of every message, and the lower bound on epsilon it proves.

The run is an ordinary one with an observer at the Grid. The observer knows the model, the canaries and every message, but not the coins,
batches or noise. It scores each canary by how far the client's message lies along the canary's current gradient (as arXiv 2302.07956 does
for DP-SGD), corrected for the client's other canaries, which it also knows. Any such score gives a valid bound.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.choices import Init, PrivacyUnit
from fedsim.config import Config
from fedsim.core.adapters import factors
from fedsim.core.gradient_parts import WHOLE, GradientParts
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.flower.grid import WatchedGrid
from fedsim.flower.records import from_record, whole_numbers
from fedsim.flower.requests import METRICS
from fedsim.flower.worker import INITIAL_GRADIENT, TRAIN, client_key
from fedsim.privacy.accounting import INITIALIZATION, TRAINING, Mechanism, epsilon
from fedsim.privacy.auditing import Bound, audit
from fedsim.session import Session, open_session
from fedsim.training.gradients import FactoredGradients, example_gradients, factor_gradients
from fedsim.types import EncodedExample

LEAST_RIDGE, MOST_RIDGE = 1e-3, 1.0
"""Bounds of the ridge that separates similar canaries: a small one keeps the regression solvable, a larger one avoids fitting noise."""


class Part(Enum):
    """The released parts of a run that the audit bounds separately."""

    initial_gradient = "initial gradients, as the server receives them"
    bases = "bases made of them, as every client receives them"
    training = "uploads of all rounds, as the server receives them"


@dataclass(frozen=True)
class Finding:
    """The bound for one part, or for all together, and the claimed epsilon, which is infinite if nothing is claimed."""

    claimed: float
    bound: Bound

    @property
    def refuted(self) -> bool:
        """Whether the bound disproves the claim."""
        return self.bound.epsilon > self.claimed


def check(config: Config) -> None:
    """Raises UserError for a configuration that cannot be audited, before anything is computed."""
    method, settled = method_of(config), effective(config)
    if config.privacy.unit is PrivacyUnit.client:
        raise UserError(
            "privacy.unit: expected example or none for an audit, got client: its canaries would be whole clients, of which one run has "
            "too few. Audit privacy=example."
        )
    if config.engine.name != "inprocess":
        raise UserError(
            f"engine: expected inprocess for an audit, whose observer stands in this process, got {config.engine.name}; leave it out."
        )
    if config.privacy.secure_aggregation:
        raise UserError(
            "privacy.secure_aggregation: expected uploads that can be seen one by one; audit without it, which bounds this too."
        )
    if config.resume:
        raise UserError("resume: expected a whole run for an audit, since its observer keeps nothing; choose another run_dir=.")
    if method.personal or method.before_upload:
        raise UserError(f"method={method.name}: expected clients that send what they train; audit another method, such as fed_sb or fedit.")
    if settled.compression.name != "none":
        raise UserError("compression: expected none for an audit, which looks at the factors themselves; add compression.name=none.")
    if config.audit.canaries < 1:
        raise UserError("audit.canaries: expected at least one canary; add audit.canaries=128.")


class Auditor:
    """Observes one run of a configuration that has passed `check`, and reports its findings."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._seen: dict[tuple[Part, int], dict[int, float]] = {}  # by part and round: score by canary

    def watching(self, grid: Grid) -> Grid:
        """Returns the Grid with the observer attached."""
        return WatchedGrid(grid, self._observe)

    def findings(self, spent: dict[str, Any] | None) -> dict[str, Finding]:
        """Returns the finding for each part and for all `together`; `spent` is the privacy account of the run, None without privacy.

        Every bound holds with the configured confidence. The bound of `together` is the best of the parts' at a higher confidence.
        Raises UserError if no client with a canary took part.
        """
        delta, confidence = spent["delta"] if spent else 0.0, self._config.audit.confidence
        coins = [canary.inside for canary in self._session.canaries]
        scores = {part: self._scores(part) for part in Part if any(seen is part for seen, _ in self._seen)}
        found = {part.name: Finding(self._claimed(spent, part), audit(own, coins, delta, confidence)) for part, own in scores.items()}
        if not scores:
            raise UserError(
                "audit.canaries: no client with a canary took part in the run; use more canaries, rounds, or a larger fraction."
            )
        shared = 1 - (1 - confidence) / len(scores)
        best = max((audit(own, coins, delta, shared) for own in scores.values()), key=lambda bound: bound.epsilon)
        return found | {"together": Finding(claimed(spent), best)}

    def _claimed(self, spent: dict[str, Any] | None, part: Part) -> float:
        """Returns the epsilon to compare a part with: its own claim, or the whole run's if its scores depend on earlier releases.

        Uploads depend on bases made from the same canaries' gradients, and gradients for refreshed bases on trained weights.
        """
        adapter = effective(self._config).adapter
        seen_through_others = adapter.init in (Init.gradient, Init.gradient_dp) if part is Part.training else adapter.refresh_every > 0
        return claimed(spent, None if seen_through_others else part)

    @property
    def init(self) -> str:
        """Name of the run's initialisation."""
        init = effective(self._config).adapter.init
        return init.name if init else ""

    @property
    def num_inside(self) -> int:
        """Number of canaries included in the data."""
        return sum(canary.inside for canary in self._session.canaries)

    @property
    def _session(self) -> Session:
        return open_session(self._config)  # the server's own

    def _scores(self, part: Part) -> np.ndarray:
        """Returns [canaries]: the sum over rounds of scores with mean 0 and variance 1; 0 for a canary that was never scored."""
        total = np.zeros(len(self._session.canaries))
        for (seen, _), found in self._seen.items():
            if seen is part:
                values = np.array(list(found.values()))
                total[list(found)] += (values - values.mean()) / (values.std() or 1.0)
        return total

    # ---- observing messages

    def _observe(self, reply: Message) -> None:
        number = int(reply.metadata.group_id)
        if reply.metadata.message_type == INITIAL_GRADIENT:
            self._score_initial_gradients(reply, number)
        elif reply.metadata.message_type == TRAIN and METRICS in reply.content:
            if (Part.bases, 0) not in self._seen and self._session.config.adapter.init in (Init.gradient, Init.gradient_dp):
                self._score_bases()
            self._score_uploads(reply, number)

    def _score_initial_gradients(self, reply: Message, number: int) -> None:
        session = self._session
        for client in range(len(session.shards)):
            mine = self._canaries_of(client)
            if client_key(client) not in reply.content or not mine:
                continue
            layout = session.gradient_parts.layout
            sent = layout.unpack(from_record(reply.content.array_records[client_key(client)], layout.num_parameters))
            gradients = self._weight_gradients(mine, session.gradient_parts)
            gram = torch.stack([each.gram() for each in gradients.values()]).sum(0)
            along = torch.stack([each.along(sent[name].to(gram.device)) for name, each in gradients.items()]).sum(0)
            plan = session.privacy_plan[client].initialization if session.privacy_plan else None
            clip = self._clip_factors(gram.diagonal().sqrt(), session.config.adapter.init is Init.gradient_dp)
            scores = separated(gram * torch.outer(clip, clip), along * clip, plan.noise_multiplier if plan else 0.0)
            self._add_scores(Part.initial_gradient, number, mine, scores)

    def _weight_gradients(self, mine: Sequence[int], parts: GradientParts = WHOLE) -> dict[str, FactoredGradients]:
        session = self._session
        return example_gradients(session.model, self._examples(mine), pad_id=session.tokenizer.pad_token_id, parts=parts)

    def _score_bases(self) -> None:
        """Scores by the first full step -B R A, which opposes the gradients it came from; without R, by a gradient's share in the bases."""
        session, spec = self._session, self._session.spec
        mine = list(range(len(session.canaries)))
        held = {name: tensor.cpu() for name, tensor in factors(session.model, spec.kinds).items()}
        gradients = self._weight_gradients(mine)
        if session.config.adapter.init is Init.gradient:
            steps = {name: -spec.update(held, name).to(session.device) for name in spec.layers}
            along = torch.stack([each.along(steps[name]) for name, each in gradients.items()]).sum(0)
            scores = separated(torch.stack([each.gram() for each in gradients.values()]).sum(0), along)
        else:
            bases = {name: (held[f"{name}.B"].to(session.device), held[f"{name}.A"].to(session.device)) for name in spec.layers}
            inside = torch.stack([each.within(*bases[name]).squared_norms() for name, each in gradients.items()]).sum(0)
            scores = inside / torch.stack([each.squared_norms() for each in gradients.values()]).sum(0).clamp(min=1e-24)
        self._add_scores(Part.bases, 0, mine, scores)

    def _score_uploads(self, reply: Message, number: int) -> None:
        """Relies on the model still holding the state from which the clients started: the server updates it after all replies."""
        metrics, training = reply.content.metric_records[METRICS], self._session.config.training
        plan = self._session.privacy_plan
        for client, count in zip(whole_numbers(metrics, "clients"), whole_numbers(metrics, "num_examples"), strict=True):
            mine = self._canaries_of(client)
            if mine:
                gradients, start = self._gradients(mine, client, number)
                step = start - from_record(reply.content.array_records[client_key(client)], len(start)).to(start.device)
                averaged_over = min(count, training.batch_size * training.accumulation)
                noise = plan[client].noise_multiplier if plan else 0.0
                self._add_scores(Part.training, number, mine, averaged_over * separated(gradients @ gradients.T, gradients @ step, noise))

    def _gradients(self, mine: Sequence[int], client: int, number: int) -> tuple[Tensor, Tensor]:
        """Returns the canaries' clipped gradients [canaries, sent] and the upload of an untrained client [sent]."""
        session, spec = self._session, self._session.spec
        trained, uploaded = session.method.trained(number), session.method.uploaded(number)
        start = spec.pack(factors(session.model, trained), trained)
        found = factor_gradients(session.model, start, spec.layout(trained), self._examples(mine), pad_id=session.tokenizer.pad_token_id)
        sent = spec.within(trained, uploaded)
        positions = session.sent_positions(number, client)
        sent = sent if positions is None else sent[positions]
        found = found[:, sent]
        clip = self._clip_factors(found.norm(dim=1), session.config.privacy.unit is PrivacyUnit.example)
        return found * clip.unsqueeze(1), start[sent]

    def _clip_factors(self, norms: Tensor, clipped: bool) -> Tensor:
        return (self._session.config.privacy.clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0) if clipped else torch.ones_like(norms)

    def _canaries_of(self, client: int) -> list[int]:
        return [place for place, canary in enumerate(self._session.canaries) if canary.client == client]

    def _examples(self, mine: Sequence[int]) -> list[EncodedExample]:
        canaries = self._session.canaries
        return [canaries[place].example for place in mine]

    def _add_scores(self, part: Part, number: int, mine: Sequence[int], scores: Tensor) -> None:
        self._seen.setdefault((part, number), {}).update(zip(mine, scores.double().cpu().tolist(), strict=True))


def separated(gram: Tensor, along: Tensor, noise_multiplier: float = 0.0) -> Tensor:
    """Returns each canary's coefficient in a noised sum of some of them, by ridge regression on their gradients.

    `gram` [canaries, canaries] holds the inner products of the gradients with each other, `along` [canaries] those with the sum. The best
    ridge for fair coins is (2 noise_multiplier)^2; it is capped, because that noise is only claimed.
    """
    norms = gram.double().diagonal().sqrt().clamp(min=1e-12)
    cosines = gram.double() / torch.outer(norms, norms)
    ridge = min(max((2 * noise_multiplier) ** 2, LEAST_RIDGE), MOST_RIDGE) * torch.eye(len(gram), dtype=norms.dtype, device=norms.device)
    return torch.linalg.solve(cosines + ridge, along.double() / norms) / norms


def claimed(spent: dict[str, Any] | None, part: Part | None = None) -> float:
    """Returns the largest epsilon of a client that a run's account claims for a part, or for all; infinite if it claims nothing."""
    if spent is None:
        return float("inf")
    name = {None: None, Part.training: TRAINING}.get(part, INITIALIZATION)
    charged = {
        (tuple(Mechanism(**each) for each in client["mechanisms"] if name in (None, each["name"])), client["delta"])
        for client in spent["per_client"]
    }
    return max(epsilon(history, delta, spent["accountant"]) for history, delta in charged)


def plain(findings: dict[str, Finding]) -> dict[str, dict[str, Any]]:
    """Returns the findings as plain values; an infinite claim becomes null in a file."""
    return {
        name: {"claimed_epsilon": each.claimed, "lower_bound": each.bound.epsilon, "refuted": each.refuted}
        | {key: value for key, value in asdict(each.bound).items() if key != "epsilon"}
        for name, each in findings.items()
    }

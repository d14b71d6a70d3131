"""Turns the uploads of a round into the next global state: mean or robust rule, noise, server optimizer, and the method's own step."""

from math import exp

import torch
from torch import Tensor

from fedsim.choices import ServerRule, Weighting
from fedsim.config import Config, ServerConfig
from fedsim.core import robust
from fedsim.core.collecting import Collector, Rule, keeps_clients
from fedsim.core.diagnosis import diagnose
from fedsim.core.exchange import CONTROL
from fedsim.core.global_state import GlobalState
from fedsim.core.methods.method import Method
from fedsim.core.participation import central_privacy
from fedsim.core.server_optimizers import SERVER_OPTIMIZERS, ServerOptions
from fedsim.errors import RunStopped
from fedsim.flower.asking import clip_norm
from fedsim.flower.facts import RoundFacts
from fedsim.flower.reading import Upload
from fedsim.flower.secure_round import SecureRound
from fedsim.privacy.accounting import split_noise
from fedsim.session import Session
from fedsim.training.private import gaussian_noise

RULES = {
    ServerRule.median: lambda options: lambda updates, weights: robust.median(updates),
    ServerRule.trimmed_mean: lambda options: (
        lambda updates, weights: robust.trimmed_mean(updates, max(options.trimmed, 1 / len(updates)))  # at least one from each end
    ),
    ServerRule.krum: lambda options: (
        lambda updates, weights: robust.krum(updates, options.malicious, options.kept or len(updates) - options.malicious)
    ),
}


class Aggregation:
    """One round's aggregation. `add` consumes uploads one at a time as they arrive; `finish` updates the global state."""

    def __init__(self, session: Session, state: GlobalState, server_round: int, facts: RoundFacts) -> None:
        self._session, self._config, self._state, self._round, self.facts = session, session.config, state, server_round, facts
        self._kinds = session.method.uploaded(server_round)
        self._collector = self._new_collector()
        self._control_change = torch.zeros_like(state.control) if state.control is not None else torch.zeros(0)

    def add(self, upload: Upload) -> None:
        """Adds one upload with its client's weight."""
        weight = float(upload.num_examples) if self._config.federation.weighting is Weighting.examples else 1.0
        self._record_facts(upload, weight)
        self._collector.add(weight, upload.flat, upload.positions, upload.distance)
        if upload.control is not None:
            # SCAFFOLD: c changes by (participants / clients) times the participants' mean change, which is sum / clients.
            self._control_change += upload.control / self._config.federation.clients

    def add_sum(self, found: SecureRound) -> None:
        """Adds the mean of a secure sum as one upload with the total weight of its clients."""
        facts = self.facts
        facts.clients, facts.num_examples, facts.weights = found.clients, found.num_examples, found.weights
        facts.loss, facts.num_tokens = [found.mean_loss] * len(found.clients), found.num_tokens
        self._collector.add(sum(found.weights), found.mean)

    def _record_facts(self, upload: Upload, weight: float) -> None:
        facts = self.facts
        facts.clients.append(upload.client)
        facts.num_examples.append(upload.num_examples)
        facts.loss.append(upload.loss)
        facts.weights.append(weight)
        facts.num_tokens += upload.num_tokens
        facts.num_within += upload.within
        facts.num_clipped += upload.clipped

    def finish(self) -> None:
        """Makes the next global state from the uploads. Without any, it stays unchanged, moments included, unless the server adds noise."""
        state, method, config = self._state, self._session.method, self._config
        noised = central_privacy(config)
        if not self.facts.clients and not noised:
            return
        start = state.flat(self._kinds)
        mean = self._noised(start) if noised else self._mean()
        new, state.moments = SERVER_OPTIMIZERS[config.server.optimizer].step(start, mean, state.moments, _server_options(config.server))
        collected = self._collector.collected(new, config.seed, self._round)
        outcome = method.finish(collected)
        state.accepted |= dict.fromkeys(self.facts.clients, self._round)
        state.replace(collected.factors | outcome.factors, method.changed(self._round), self._round)
        if outcome.fold:
            state.fold(outcome.fold, self._round)
        if state.control is not None:
            state.control = state.control + self._control_change
            state.exchange.changed([CONTROL], self._round)
        if config.evaluation.diagnosis:
            self.facts.diagnosis = diagnose(self._collector, collected, state, outcome.fold, exact=averages_exactly(config, method))

    def _mean(self) -> Tensor:
        """Raises RunStopped if the server's rule needs more clients than have replied."""
        try:
            return self._collector.mean()
        except ValueError as error:
            raise RunStopped(
                f"server.rule: round {self._round} has too few clients for {self._config.server.rule.name}: {error} The rounds before are "
                "in the last checkpoint; start again with a larger federation.min_replies or another rule, or try again with resume=true."
            ) from None

    def _noised(self, start: Tensor) -> Tensor:
        """Adds to `start` the noised sum of the clipped updates over the expected number of participants (client-level privacy).

        Computed in float64 and rounded once, see `gaussian_noise`; one client could move a sum derived from a float32 mean by more than
        the clip norm. With `privacy.adaptive_clip` the clip norm follows a quantile of the update norms through a noised count
        (arXiv 1905.03871).
        """
        config, facts = self._config, self.facts
        options, expected = config.privacy, config.federation.fraction * config.federation.clients
        generator = self._session.noise_key.torch("server noise", self._round)
        noise, bound = self._session.privacy_plan[0].noise_multiplier, clip_norm(self._session, self._state)
        if options.adaptive_clip:
            count_noise = max(expected / 20, noise)
            noise = split_noise(noise, count_noise)
            count = facts.num_within - len(facts.clients) / 2 + float(gaussian_noise(count_noise, (), generator))
            adapted = bound * exp(-options.clip_rate * (count / expected + 0.5 - options.clip_quantile))
            self._state.clip_norm = float(torch.tensor(adapted, dtype=torch.float32))  # the value sent to clients
        total = self._collector.change()
        return (start + (total + gaussian_noise(noise * bound, total.shape, generator)) / expected).float()

    def _new_collector(self) -> Collector:
        config, method = self._config, self._session.method
        wanted = method.products or (config.evaluation.diagnosis and not method.exact)
        rule: Rule | None = RULES[config.server.rule](config.server) if config.server.rule in RULES else None
        keep_clients = keeps_clients(config.method, method.folds)
        return Collector(
            self._session.spec,
            self._kinds,
            self._state.factors,
            self._state.flat(self._kinds),
            config.method,
            keep_products=wanted and not keep_clients,
            keep_clients=keep_clients,
            rule=rule,
        )


def averages_exactly(config: Config, method: Method) -> bool:
    """Whether a round's global update is, by construction, the weighted mean of the clients' updates: no robust rule, no other server
    step, no entries sent by only some clients, no truncated residual, and nothing kept at the clients."""
    server, heads = config.server, config.method.heads
    partial = method.linear and (bool(config.federation.ranks) or (config.method.client_heads or heads) < heads)
    plain_mean = server.rule is ServerRule.mean and server.optimizer == "fedavg" and server.learning_rate == 1
    return method.exact and plain_mean and not partial and config.method.residual_rank is None and not method.personal


def _server_options(server: ServerConfig) -> ServerOptions:
    return ServerOptions(server.learning_rate, server.momentum, server.beta2, server.tau)

"""Refuses options that void a privacy guarantee, with the reason and the alternatives."""

from collections.abc import Iterator

from fedsim.choices import Init, NoiseSource, PrivacyUnit, ServerRule, Weighting
from fedsim.config import Config
from fedsim.core.methods import Method
from fedsim.errors import UserError

SAFE_INITS = (Init.gradient_dp, Init.gradient_public, Init.weight_svd, Init.orthogonal)


def default_init(config: Config, method: Method) -> Init:
    """Returns the method's default initialisation, or with privacy `weight_svd` in place of `gradient`."""
    if config.privacy.unit is PrivacyUnit.none or method.inits[0] is not Init.gradient:
        return method.inits[0]
    return Init.weight_svd


def check(config: Config, method: Method) -> None:
    """Raises UserError for the first option that is incompatible with privacy, or requires it."""
    for reason in _reasons(config, method):
        raise UserError(reason)


def _reasons(config: Config, method: Method) -> Iterator[str]:
    privacy, init = config.privacy, config.adapter.init
    if privacy.unit is PrivacyUnit.none:
        if init is Init.gradient_dp:
            yield "adapter.init=gradient_dp: its noise belongs to a privacy budget; choose privacy=example, or adapter.init=gradient."
        for option in ("epsilon", "noise_multiplier", "delta"):
            if (value := getattr(privacy, option)) is not None:
                yield f"privacy.{option}={value:g} has no effect alone: add privacy=example or privacy=client, or make it null."
        return
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        yield "privacy: expected privacy.epsilon or privacy.noise_multiplier, got neither; give one of them."
    if init is Init.gradient and not privacy.unsafe_init:
        names = ", ".join(each.name for each in SAFE_INITS)
        yield (
            "adapter.init=gradient: the bases would be computed from private data without noise, which no epsilon covers; "
            f"choose one of {names}. For an audit of the leak add privacy.unsafe_init=true."
        )
    if privacy.noise is NoiseSource.system and config.engine.name == "ray":
        yield "privacy.noise=system: each process of engine=ray would have its own key, and a new one after resume; use engine=inprocess."
    if privacy.unit is PrivacyUnit.client:
        yield from _client_reasons(config, method)


def _client_reasons(config: Config, method: Method) -> Iterator[str]:
    privacy = config.privacy
    if config.adapter.init in (Init.gradient, Init.gradient_dp):
        yield f"adapter.init={config.adapter.init.name}: undefined cost with unit=client; use weight_svd, orthogonal or gradient_public."
    if config.federation.weighting is not Weighting.uniform:
        yield "federation.weighting: noise is scaled for equal weights; with unit=client set federation.weighting=uniform."
    if not method.linear or method.pooled:
        yield f"privacy.unit=client: noise belongs to a mean of updates, which {method.name} does not form; use privacy.unit=example."
    if method.personal:
        yield f"privacy.unit=client: {method.name} leaves factors at the clients that no noise covers; use privacy.unit=example."
    if config.federation.ranks or config.method.client_heads or config.training.scaffold:
        yield "privacy.unit=client: expected every client to send all factors and nothing else; leave out ranks, client_heads and scaffold."
    if privacy.secure_aggregation and privacy.noise_multiplier == 0:
        yield "privacy.noise_multiplier=0: with privacy.secure_aggregation the clients add the noise, and refuse to add none; give some."
    if privacy.secure_aggregation and privacy.adaptive_clip:
        yield "privacy.adaptive_clip: its counts have no price in discrete noise; leave it out with privacy.secure_aggregation."
    if config.server.rule is not ServerRule.mean or config.compression.name != "none":
        yield "privacy.unit=client: its sensitivity is that of a plain mean; leave out server.rule and compression."

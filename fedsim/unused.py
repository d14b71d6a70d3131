"""Reports options that were given but have no effect because of other options; the run continues."""

from collections.abc import Callable
from dataclasses import dataclass

from fedsim.choices import FROM_GRADIENTS, Init, Mode, Optimizer, Partition, PrivacyUnit, ServerRule
from fedsim.config import Config
from fedsim.config_check import value_of
from fedsim.core.forms import RAVAN
from fedsim.core.methods import Method
from fedsim.effective import effective, method_of

ADAPTIVE = ("fedadagrad", "fedyogi", "fedadam")


@dataclass(frozen=True)
class Condition:
    """Options `keys` have an effect only if `holds`; `text` describes this in command-line terms."""

    keys: tuple[str, ...]
    text: str
    holds: Callable[[Config, Method], bool]


CONDITIONS = (
    Condition(("method.residual",), "method=fedex_lora or flora", lambda _, method: method.folds),
    Condition(("method.heads",), "method=ravan", lambda _, method: method.form is RAVAN),
    Condition(("adapter.rank", "adapter.scaling"), "a method with adapters", lambda _, method: method.form.low_rank),
    Condition(("adapter.init_samples",), "an initialisation from gradients", lambda config, _: config.adapter.init in FROM_GRADIENTS),
    Condition(
        ("federation.alpha", "federation.dirichlet_over"),
        "federation.partition=dirichlet",
        lambda config, _: config.federation.partition is Partition.dirichlet,
    ),
    Condition(
        ("training.beta1", "training.beta2", "training.epsilon"),
        "training.optimizer=adamw",
        lambda config, _: config.training.optimizer is Optimizer.adamw,
    ),
    Condition(("training.momentum",), "training.optimizer=sgd", lambda config, _: config.training.optimizer is Optimizer.sgd),
    Condition(("training.local_steps",), "training.local_epochs=null", lambda config, _: config.training.local_epochs is None),
    Condition(("server.trimmed",), "server.rule=trimmed_mean", lambda config, _: config.server.rule is ServerRule.trimmed_mean),
    Condition(("server.malicious", "server.kept"), "server.rule=krum", lambda config, _: config.server.rule is ServerRule.krum),
    Condition(
        ("server.momentum",),
        "server.optimizer=fedavgm, fedadam or fedyogi",
        lambda config, _: config.server.optimizer in ("fedavgm", "fedadam", "fedyogi"),
    ),
    Condition(
        ("server.beta2",),
        "server.optimizer=fedadam or fedyogi",
        lambda config, _: config.server.optimizer in ("fedadam", "fedyogi"),
    ),
    Condition(("server.tau",), f"server.optimizer={', '.join(ADAPTIVE)}", lambda config, _: config.server.optimizer in ADAPTIVE),
    Condition(("compression.density",), "compression.name=top_k", lambda config, _: config.compression.name == "top_k"),
    Condition(
        ("privacy.clip_norm", "privacy.accountant", "privacy.noise"),
        "privacy.unit=example or client",
        lambda config, _: config.privacy.unit is not PrivacyUnit.none,
    ),
    Condition(
        ("privacy.init_share", "privacy.init_noise_multiplier"),
        "adapter.init=gradient_dp",
        lambda config, _: config.adapter.init is Init.gradient_dp,
    ),
    Condition(
        ("privacy.unsafe_init",),
        "adapter.init=gradient with privacy",
        lambda config, _: config.adapter.init is Init.gradient and config.privacy.unit is not PrivacyUnit.none,
    ),
    Condition(("privacy.adaptive_clip",), "privacy.unit=client", lambda config, _: config.privacy.unit is PrivacyUnit.client),
    Condition(("privacy.clip_quantile", "privacy.clip_rate"), "privacy.adaptive_clip=true", lambda config, _: config.privacy.adaptive_clip),
    Condition(
        ("secure.bits", "secure.range", "secure.gradient_range", "secure.threshold", "secure.neighbours"),
        "privacy.secure_aggregation=true",
        lambda config, _: config.privacy.secure_aggregation,
    ),
    Condition(
        ("server.max_update_norm", "server.over_norm"),
        "uploads that the server sees as they are, neither privacy.secure_aggregation=true nor privacy.unit=client",
        lambda config, _: not config.privacy.secure_aggregation and config.privacy.unit is not PrivacyUnit.client,
    ),
    Condition(
        ("federation.min_replies", "federation.retries"),
        "rounds that wait for single clients: neither privacy.secure_aggregation=true nor federation.mode=fedbuff",
        lambda config, _: not config.privacy.secure_aggregation and config.federation.mode is Mode.sync,
    ),
    Condition(("audit.confidence",), "audit.canaries", lambda config, _: config.audit.canaries > 0),
    Condition(("engine.superlink", "engine.wait_seconds"), "engine=deployment", lambda config, _: config.engine.name == "deployment"),
    Condition(("engine.actors", "engine.address"), "engine=ray", lambda config, _: config.engine.name == "ray"),
)


def unused(config: Config) -> list[str]:
    """Returns a line for each option that differs from its default but has no effect in this configuration."""
    carried_out, method, plain = effective(config), method_of(config), Config()
    return [
        f"{key} has no effect here: it is for {condition.text}"
        for condition in CONDITIONS
        if not condition.holds(carried_out, method)
        for key in condition.keys
        if value_of(config, key) != value_of(plain, key)
    ]

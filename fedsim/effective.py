"""What is carried out of a configuration, once the method has settled what it decides; known without model and data."""

from dataclasses import replace

from fedsim.choices import FROM_GRADIENTS, Accountant, Partition, PrivacyUnit, Reading
from fedsim.config import AdapterConfig, Config
from fedsim.core.methods import METHODS, Method, combinations, with_head
from fedsim.core.participation import round_size
from fedsim.data import labels
from fedsim.errors import UserError, nearest
from fedsim.links import check as check_links
from fedsim.privacy import checks as privacy_checks


def effective(config: Config) -> Config:
    """Returns the configuration that is carried out, with nothing left open that the method decides.

    A pooled method has one client, who has everything, whatever the partition, and whose batch is the union of those of a round's clients.
    """
    method = method_of(config)
    combinations.check(config, method)
    check_links(config)
    _check_pairs(config)
    _check_tasks(config, method)
    _check_canaries(config)
    adapter = replace(config.adapter, init=config.adapter.init or privacy_checks.default_init(config, method))
    _check_sketch(adapter, method)
    privacy_checks.check(replace(config, adapter=adapter), method)
    if config.federation.ranks:
        adapter = replace(adapter, rank=max(config.federation.ranks))
    config = replace(config, adapter=adapter)
    if config.privacy.secure_aggregation or config.privacy.unit is PrivacyUnit.client:  # it tells of uploads as they came
        config = replace(config, evaluation=replace(config.evaluation, diagnosis=False))
    if config.privacy.secure_aggregation and config.privacy.unit is PrivacyUnit.client:
        config = replace(config, privacy=replace(config.privacy, accountant=Accountant.skellam))
    if not method.pooled:
        return config
    federation = replace(config.federation, clients=1, fraction=1.0, partition=Partition.iid, quantity_sigma=0.0)
    of_a_round = round_size(config.federation.clients, config.federation.fraction)
    training = replace(config.training, batch_size=config.training.batch_size * of_a_round)
    return replace(config, federation=federation, training=training)


def _check_sketch(adapter: AdapterConfig, method: Method) -> None:
    if adapter.sketch and adapter.init not in FROM_GRADIENTS:
        others = ", ".join(init.name for init in FROM_GRADIENTS if init in method.inits)
        choose = f"choose one of {others}, or leave it out" if others else "leave it out"
        given = adapter.init.name if adapter.init else ""
        raise UserError(f"adapter.sketch: with method={method.name} and adapter.init={given} there are no initial gradients; {choose}.")


def _check_pairs(config: Config) -> None:
    if config.model.pairs is Reading.apart and not labels(config.data):
        raise UserError(
            f"model.pairs=apart: texts of a pair are read apart where they are classified, and data={config.data.name} is answered; "
            "choose data=snli or data=sick, or a model that generates."
        )


def _check_tasks(config: Config, method: Method) -> None:
    if config.data.task_column is not None and method.personal and config.engine.name == "deployment":
        raise UserError(
            f"data.task_column={config.data.task_column}: clients of a deployment answer with models of their own (method.name="
            f"{method.name}) about tasks of data of their own, where no column names them; leave it out, or simulate."
        )


def _check_canaries(config: Config) -> None:
    if config.audit.canaries and labels(config.data):
        raise UserError("audit.canaries: a canary is a text that is answered, and this data is classified; audit other data.")


def method_of(config: Config) -> Method:
    """Returns the method that the configuration names, with a classification head where the data has labels.

    Raises UserError for an unknown one.
    """
    if config.method.name not in METHODS:
        raise UserError(
            f"method.name: expected one of {', '.join(METHODS)}, got {config.method.name!r}.{nearest(config.method.name, list(METHODS))}"
        )
    method = METHODS[config.method.name]
    return with_head(method) if labels(config.data) else method

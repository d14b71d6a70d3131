"""Resolves the defaults that depend on the method, giving the configuration that actually runs; needs neither model nor data."""

from dataclasses import replace

from fedsim.choices import FROM_GRADIENTS, Accountant, DirichletOver, PairReading, Partition, PrivacyUnit
from fedsim.config import AdapterConfig, Config
from fedsim.core.methods import METHODS, Method, combinations, with_head
from fedsim.core.participation import round_size
from fedsim.data import labels
from fedsim.errors import UserError, nearest
from fedsim.links import check as check_links
from fedsim.privacy import checks as privacy_checks


def effective(config: Config) -> Config:
    """Returns the configuration that runs, with all defaults that depend on the method filled in. Raises UserError for contradictions.

    A pooled method has one client, which holds all data regardless of the partition; its batch unites the batches of a round's clients.
    """
    method = method_of(config)
    combinations.check(config, method)
    check_links(config)
    _check_pairs(config)
    _check_labels(config)
    _check_tasks(config, method)
    _check_canaries(config)
    adapter = replace(config.adapter, init=config.adapter.init or privacy_checks.default_init(config, method))
    _check_sketch(adapter, method)
    privacy_checks.check(replace(config, adapter=adapter), method)
    if config.federation.ranks:
        adapter = replace(adapter, rank=max(config.federation.ranks))
    config = replace(config, adapter=adapter, federation=replace(config.federation, dirichlet_over=_dirichlet_over(config)))
    if config.privacy.secure_aggregation or config.privacy.unit is PrivacyUnit.client:  # it would reveal single uploads
        config = replace(config, evaluation=replace(config.evaluation, diagnosis=False))
    if config.privacy.secure_aggregation and config.privacy.unit is PrivacyUnit.client:
        config = replace(config, privacy=replace(config.privacy, accountant=Accountant.skellam))
    if not method.pooled:
        return config
    federation = replace(config.federation, clients=1, fraction=1.0, partition=Partition.iid, quantity_sigma=0.0)
    of_a_round = round_size(config.federation.clients, config.federation.fraction)
    training = replace(config.training, batch_size=config.training.batch_size * of_a_round)
    return replace(config, federation=federation, training=training)


def _dirichlet_over(config: Config) -> DirichletOver:
    """Returns the configured choice; by default label for classified data whose rows name no tasks, since it is one task, else task."""
    by_label = labels(config.data) != () and config.data.task_column is None
    return config.federation.dirichlet_over or (DirichletOver.label if by_label else DirichletOver.task)


def _check_sketch(adapter: AdapterConfig, method: Method) -> None:
    if adapter.sketch and adapter.init not in FROM_GRADIENTS:
        others = ", ".join(init.name for init in FROM_GRADIENTS if init in method.inits)
        choose = f"choose one of {others}, or leave it out" if others else "leave it out"
        given = adapter.init.name if adapter.init else ""
        raise UserError(f"adapter.sketch: with method={method.name} and adapter.init={given} there are no initial gradients; {choose}.")


def _check_pairs(config: Config) -> None:
    if config.model.pairs is PairReading.apart and labels(config.data) == ():
        raise UserError(
            f"model.pairs=apart: texts of a pair are read apart where they are classified, and data={config.data.name} is answered; "
            "choose data=snli, sick or classification, or a model that generates."
        )


def _check_labels(config: Config) -> None:
    """Requires labels in a deployment: no process sees all rows, and all must map the head's outputs to the same labels."""
    if labels(config.data) is None and not config.data.labels and (config.engine.name == "deployment" or config.data.owner is not None):
        raise UserError(
            f"data.labels: expected the labels of data={config.data.name}, got none: clients of a deployment see rows of their own alone. "
            "Name them for all: data.labels=[negative,positive]."
        )


def _check_tasks(config: Config, method: Method) -> None:
    if config.data.task_column is not None and method.personal and config.engine.name == "deployment":
        raise UserError(
            f"data.task_column={config.data.task_column}: clients of a deployment answer with models of their own (method.name="
            f"{method.name}) about tasks of data of their own, where no column names them; leave it out, or simulate."
        )


def _check_canaries(config: Config) -> None:
    if config.audit.canaries and labels(config.data) != ():
        raise UserError("audit.canaries: a canary is a text that is answered, and this data is classified; audit other data.")


def method_of(config: Config) -> Method:
    """Returns the configured method, with a classification head if the data has labels.

    Raises UserError for an unknown name.
    """
    if config.method.name not in METHODS:
        raise UserError(
            f"method.name: expected one of {', '.join(METHODS)}, got {config.method.name!r}.{nearest(config.method.name, list(METHODS))}"
        )
    method = METHODS[config.method.name]
    return method if labels(config.data) == () else with_head(method)

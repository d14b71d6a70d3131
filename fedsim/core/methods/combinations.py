"""Checks which options make sense with which method; refuses other combinations with the reason."""

from collections.abc import Iterator

from fedsim.choices import Init, Mode, Optimizer, OverNorm, PrivacyUnit, ServerRule
from fedsim.config import Config
from fedsim.core.compression import CODECS
from fedsim.core.forms import RAVAN
from fedsim.core.methods.method import Method
from fedsim.core.network import NO_NETWORK
from fedsim.core.participation import buffer_size, concurrency, round_size
from fedsim.core.quantization import limit_of
from fedsim.core.server_optimizers import SERVER_OPTIMIZERS
from fedsim.errors import UserError, nearest


def check(config: Config, method: Method) -> None:
    """Raises UserError for the first combination that makes no sense."""
    for unfit in (
        _unknown,
        _initialisation,
        _ranks,
        _pooled,
        _server,
        _robust,
        _failures,
        _network,
        _buffered,
        _local,
        _compression,
        _method_options,
        _secure,
    ):
        for reason in unfit(config, method):
            raise UserError(reason)


def _unknown(config: Config, method: Method) -> Iterator[str]:
    for key, value, known in (
        ("compression.name", config.compression.name, ["none", *CODECS]),
        ("server.optimizer", config.server.optimizer, list(SERVER_OPTIMIZERS)),
    ):
        if value not in known:
            yield f"{key}: expected one of {', '.join(known)}, got {value!r}.{nearest(value, known)}"


def _initialisation(config: Config, method: Method) -> Iterator[str]:
    init, every = config.adapter.init, config.adapter.refresh_every
    if init is not None and init not in method.inits:
        names = ", ".join(each.name for each in method.inits)
        yield f"adapter.init: method={method.name} starts from {names}, got {init.name}; leave adapter.init out for {method.inits[0].name}."
    if every and "R" not in method.ever_trained:
        yield f"adapter.refresh_every: only LoRA-SB can recompute its bases, got {every} with method={method.name}; leave it out."
    if every and (config.federation.ranks or (init or method.inits[0]) is Init.gradient_public):
        yield f"adapter.refresh_every: expected equal ranks and bases from clients, weights or a seed, got {every}; leave one of them out."


def _ranks(config: Config, method: Method) -> Iterator[str]:
    ranks = config.federation.ranks
    if not ranks:
        return
    if not method.ranks:
        yield f"federation.ranks: {method.name} averages factors entry by entry, which mixes directions of different ranks; use one rank."
    if min(ranks) < 1 or min(ranks.values()) <= 0:
        yield f"federation.ranks: expected ranks of at least 1 and positive shares, got {ranks}."
    if config.adapter.rank not in (None, max(ranks)):
        yield f"adapter.rank: expected the largest of federation.ranks, {max(ranks)}, or null, got {config.adapter.rank}."


def _pooled(config: Config, method: Method) -> Iterator[str]:
    if method.pooled and config.training.local_epochs is not None and config.federation.fraction < 1:
        yield (
            f"training.local_epochs: an epoch of {method.name} covers all of the data, but a round with federation.fraction="
            f"{config.federation.fraction:g} only its clients' part; use training.local_steps."
        )
    if method.pooled and config.federation.dropout:
        yield f"federation.dropout: {method.name} has one party, got {config.federation.dropout:g}; leave it out."


def _server(config: Config, method: Method) -> Iterator[str]:
    optimizer, rate = config.server.optimizer, config.server.learning_rate
    if optimizer != "fedavg" and not method.lasting:
        yield f"server.optimizer: {method.name} redefines the factors every round, so moments cannot be kept; use fedavg."
    if optimizer != "fedavg" and (config.federation.ranks or config.method.client_heads):
        given = "federation.ranks" if config.federation.ranks else "method.client_heads"
        yield f"server.optimizer: with {given} an entry may lack an update in a round; use fedavg."
    if rate != 1 and method.products:
        yield f"server.learning_rate: {method.name} takes the mean of the clients' updates as it is, got {rate:g}; leave it out."


def _robust(config: Config, method: Method) -> Iterator[str]:
    server, rule = config.server, config.server.rule
    buffered = config.federation.mode is Mode.fedbuff
    clients = buffer_size(config.federation) if buffered else round_size(config.federation.clients, config.federation.fraction)
    if config.training.scaffold and rule is not ServerRule.mean:
        yield f"training.scaffold: control variates are averaged without {rule.name}; leave it out."
    if rule is not ServerRule.mean and (method.products or config.federation.ranks or config.method.client_heads):
        yield f"server.rule: {rule.name} compares whole uploads entry by entry, which {method.name} as configured has none of; use mean."
    if rule is not ServerRule.mean and method.pooled:
        yield f"server.rule: {method.name} has one party, got {rule.name}; use mean."
    if rule is ServerRule.trimmed_mean and int(server.trimmed * clients) == 0:
        yield f"server.trimmed: {server.trimmed:g} of {clients} clients rounds down to none; raise it, or use server.rule=mean."
    if rule is ServerRule.krum and clients < 2 * server.malicious + 3:
        yield f"server.malicious: krum needs 2 x malicious + 3 clients in a round, got {server.malicious} of {clients}; lower it."
    if rule is ServerRule.krum and server.kept > clients - server.malicious:
        yield f"server.kept: expected at most the {clients - server.malicious} clients that are not malicious, got {server.kept}."


def _failures(config: Config, method: Method) -> Iterator[str]:
    federation, server = config.federation, config.server
    wanted = round_size(federation.clients, federation.fraction)
    if federation.min_replies >= 1 and (federation.min_replies > wanted or federation.min_replies % 1):
        given = f"{federation.min_replies:g}"
        yield f"federation.min_replies: expected a part below 1, or a whole number up to the {wanted} clients of a round, got {given}."
    if federation.over_selection and federation.fraction == 1:
        yield "federation.over_selection: with federation.fraction=1 every client is drawn already; lower one of them."
    if federation.over_selection and config.privacy.secure_aggregation:
        yield "federation.over_selection: a secure sum includes every remaining client, so none can be left out; leave it out."
    if federation.over_selection and config.privacy.unit is PrivacyUnit.client:
        yield "federation.over_selection: with privacy.unit=client each client is drawn by its own coin; leave it out."
    if server.over_norm is OverNorm.clip and server.max_update_norm is None:
        yield "server.over_norm: there is no norm to clip to; set server.max_update_norm as well."


def _network(config: Config, method: Method) -> Iterator[str]:
    federation, simulated = config.federation, config.federation.network != NO_NETWORK
    if simulated and (method.pooled or config.engine.name == "deployment"):
        yield f"federation.network: expected a simulation in which something is sent, got {federation.network}; leave it out."
    if simulated and config.privacy.secure_aggregation:
        yield "federation.network: the stages of secure aggregation have no simulated times; leave one of them out."
    if federation.deadline is not None and not simulated:
        yield "federation.deadline: expected a simulated network, got none; choose federation.network, or round_timeout for a real one."
    if federation.mode is Mode.fedbuff and not simulated:
        yield "federation.mode=fedbuff: who arrives first is a matter of the network; choose federation.network=uniform, or another."


def _buffered(config: Config, method: Method) -> Iterator[str]:
    federation = config.federation
    if federation.mode is not Mode.fedbuff:
        if federation.concurrency is not None or federation.buffer is not None:
            yield "federation.concurrency, federation.buffer: only fedbuff has them; add federation.mode=fedbuff or leave them out."
        return
    same = method.lasting and len(method.turns) == 1 and not (method.folds or method.products or method.recomputed)
    if not same or method.personal or method.local or method.restart or method.pooled:
        yield f"federation.mode=fedbuff: {method.name} produces updates for their own round only; use fed_sb, ffa_lora, fedit or full."
    if config.privacy.unit is not PrivacyUnit.none:
        yield "federation.mode=fedbuff: how often a client takes part is not known beforehand, so no epsilon is planned; use privacy=none."
    if config.adapter.refresh_every or config.training.scaffold or config.compression.error_feedback:
        yield "federation.mode=fedbuff: updates come late, to other bases and variates; leave out refresh_every, scaffold, error_feedback."
    if federation.deadline is not None or federation.over_selection:
        yield "federation.mode=fedbuff: no update is too late; leave out federation.deadline and over_selection."
    if not (federation.buffer or 1) <= (at_once := concurrency(federation)) <= federation.clients:
        yield (
            f"federation.concurrency: expected at least federation.buffer={federation.buffer or 1} and at most the {federation.clients} "
            f"clients, got {at_once}."
        )


def _local(config: Config, method: Method) -> Iterator[str]:
    training = config.training
    if not training.scaffold:
        return
    if training.optimizer is not Optimizer.sgd or training.momentum or training.weight_decay:
        yield "training.scaffold: its control variates are gradients of plain SGD; set training.optimizer=sgd and training.momentum=0."
    if training.proximal_mu:
        yield "training.scaffold: its control variates, means of what clients step along, would hold FedProx's pull; leave out proximal_mu."
    if not method.lasting or method.personal or method.local or method.pooled:
        yield f"training.scaffold: {method.name} has no common factors that mean the same in every round; leave it out."
    if config.federation.ranks or config.adapter.refresh_every:
        yield "training.scaffold: expected one rank and lasting bases; leave out federation.ranks and adapter.refresh_every."


def _compression(config: Config, method: Method) -> Iterator[str]:
    options = config.compression
    if options.name == "none":
        if options.error_feedback:
            yield "compression.error_feedback: there is no error without compression; choose compression.name as well."
        return
    if method.pooled:
        yield f"compression.name: {method.name} sends nothing, got {options.name}; leave it out."
    if options.error_feedback and not (method.lasting and not config.adapter.refresh_every and not config.method.client_heads):
        yield f"compression.error_feedback: {method.name} as configured redefines the factors every round; leave it out."


def _method_options(config: Config, method: Method) -> Iterator[str]:
    options = config.method
    if options.residual_rank is not None and not method.folds_residual:
        yield f"method.residual_rank: only fedex_lora sends a residual that may be truncated, got method={method.name}; leave it out."
    if options.client_heads is not None and method.form is not RAVAN:
        yield f"method.client_heads: only ravan has several heads, got method={method.name}; leave it out."
    if options.client_heads is not None and options.client_heads > options.heads:
        yield f"method.client_heads: expected at most method.heads={options.heads}, got {options.client_heads}; lower it."


def _secure(config: Config, method: Method) -> Iterator[str]:
    clients, key = round_size(config.federation.clients, config.federation.fraction), "privacy.secure_aggregation"
    if not config.privacy.secure_aggregation:
        return
    if not method.linear:
        yield f"{key}: {method.name} needs every client's own factors, and a sum does not give them; choose a method that averages."
    if method.pooled:
        yield f"{key}: {method.name} sends nothing; leave it out."
    if config.server.rule is not ServerRule.mean:
        yield f"{key}: server.rule={config.server.rule.name} compares single uploads, which are hidden; use mean."
    if config.compression.name != "none":
        yield f"{key}: masked uploads are uniform and do not compress, got {config.compression.name}; use fewer secure.bits instead."
    if config.federation.ranks or config.method.client_heads:
        yield f"{key}: an entry that few clients send would be seen; leave out federation.ranks and method.client_heads."
    if config.training.scaffold:
        yield f"{key}: SCAFFOLD's control variates would travel unmasked; leave out training.scaffold."
    if clients < 2:
        yield f"{key}: the sum over one client is its upload, got rounds of {clients}; raise federation.clients or federation.fraction."
    if 2 * clients * limit_of(config.secure.bits) >= 1 << 32:
        yield f"secure.bits: the sum of {clients} values of {config.secure.bits} bits does not fit into 32 bits; use fewer bits."

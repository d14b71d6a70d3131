"""The state of an experiment in one process: the adapted base model, the tokenizer, the data and its partition.

The server and the workers of a simulation share it within a process, so there is one base model for any number of clients; every worker
process opens its own from the same configuration.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from math import ceil

import torch
from torch import Tensor

from fedsim import token_cache
from fedsim.choices import NoiseSource, PrivacyUnit
from fedsim.config import Config
from fedsim.core.adapters import adapt, adapted_layers, base_weights, install
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.exchange import WEIGHTS
from fedsim.core.forms import RAVAN
from fedsim.core.global_state import GlobalState
from fedsim.core.gradient_parts import parts_of
from fedsim.core.initialization import DERIVED, new_head
from fedsim.core.network import Link, dropout_rates
from fedsim.core.participation import steps_per_round
from fedsim.core.partition import holdings
from fedsim.core.ranks import deal_ranks
from fedsim.core.traffic import starting_exchange
from fedsim.data import Dataset, labels, load
from fedsim.data import check as check_data
from fedsim.data.assignment import assign_examples
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.links import links_of
from fedsim.memory import keep_freed_memory
from fedsim.models import check as check_model
from fedsim.models import head_paths, load_model
from fedsim.plain import from_dict, to_dict
from fedsim.privacy.canaries import Canary, canaries
from fedsim.privacy.plan import ClientPlan, plan
from fedsim.seeding import NoiseKey, derive_seed, numpy_generator
from fedsim.shapes import adapter_of, skeleton
from fedsim.training import conversations
from fedsim.training.budget import Load, TokenBudget, tokens_for_training
from fedsim.training.cohort import ClientData, PassFacts
from fedsim.training.encoding import describe_limit, end_tokens, has_response, is_truncated
from fedsim.training.labelled import encode_any
from fedsim.types import Adapter, AnyEncoded, AnyExample, EncodedExample, Example

OWN_DATA = "own data"  # task name in the holdings for clients that do not report theirs

_PLACEHOLDER_LABELS = ("no", "yes")
"""Placeholders for labels that only the rows contain: their number does not affect the adapted layers."""


def check(config: Config) -> None:
    """Raises the UserErrors of `open_session` that show from options, paths, first rows and the model's config.json.

    Guarantees: takes a fraction of a second, downloads and writes nothing, and accepts every configuration that `open_session` accepts.
    Errors in models and data of the hub appear on loading, except for those in a config.json in the hub's cache.
    """
    method, config = method_of(config), effective(config)
    loaded = replace(config.model, architecture={})  # a run takes the architecture from the model itself
    known = labels(config.data)
    classes = _PLACEHOLDER_LABELS if known is None else known
    check_data(config.data)
    check_model(config.model, classes)
    try:
        skeleton(loaded, classes)
    except UserError:  # the shapes are unknown, or the loader reports the error
        return
    parts_of(config, adapter_of(replace(config, model=loaded), method, classes))


def open_session(config: Config) -> "Session":
    """Returns the session of this configuration; the latest is cached, so that the workers of a process share the server's."""
    text = json.dumps(to_dict(replace(config, run_dir=None, resume=False, overwrite=False)))
    if text not in _latest:
        _latest.clear()  # a GPU may not fit two models
        _latest[text] = Session(from_dict(Config, json.loads(text)))
    return _latest[text]


def forget_session() -> None:
    """Drops the cached session, so that the next one reads model, data and methods again: they may have changed."""
    _latest.clear()


_latest: dict[str, "Session"] = {}  # by its configuration


class Session:
    """The adapted model, the data and its partition, shared by the server and the workers in its process."""

    def __init__(self, config: Config) -> None:
        keep_freed_memory()
        self.method = method_of(config)
        self.config = config = effective(config)
        self.on_pass: Callable[[PassFacts], None] = lambda facts: None
        self.data: Dataset = load(config.data, config.seed)
        self.pool, self.shards, self.public = assign_examples(config, self.data.train)
        classes, checkpointing = self.data.labels, config.training.activation_checkpointing
        self.model, self.tokenizer = load_model(config.model, classes, self.data.texts, activation_checkpointing=checkpointing)
        adapter = config.adapter
        head = head_paths(self.model) if classes else []
        self.spec = adapt(self.model, self.method.form, adapter.rank, config.method.heads, adapter.scaling, adapter.target_modules, head)
        self.gradient_parts = parts_of(config, self.spec)  # the form in which initial gradients are sent
        self.ranks = deal_ranks(len(self.shards), config.federation.ranks, config.seed) if config.federation.ranks else None
        self.load = Load.of(config, self.spec, self.method)
        self.budget = self.new_budget()
        conversations.check(chain(self.data.train, *self.data.test.values()), self.tokenizer)
        self.noise_key = NoiseKey.of_seed(config.seed) if config.privacy.noise is NoiseSource.seed else NoiseKey.secret()
        self.digests: dict[str, str] = {}  # of the parts of the global state installed in the model
        self.folded: Adapter = {}  # updates added to the base weights, on the CPU
        self.own_data: dict[int, int] = {}  # number of examples by client, for clients with their own data
        self.lengths: Counter[str] = Counter()  # clients' examples so far: "read", of these "left out" and "cut", see `client_data`
        self._clients: dict[int, ClientData] = {}
        self._positions: dict[tuple[tuple[str, ...], int], Tensor | None] = {}

    @cached_property
    def privacy_plan(self) -> list[ClientPlan]:
        """Every client's privacy plan; empty if nothing is claimed. Calibration takes seconds."""
        if self.config.privacy.unit is PrivacyUnit.none:
            return []
        clients = range(len(self.shards))
        return plan(self.config, [self.own_data.get(client) or len(self.client_data(client).examples) for client in clients])

    def set_own_data_sizes(self, own_data: dict[int, int]) -> None:
        """Records the numbers of examples of clients that train on their own data instead of the shards dealt here."""
        self.own_data = own_data
        self.__dict__.pop("privacy_plan", None)
        self.__dict__.pop("holdings", None)

    def check_num_examples(self, client: int, count: int) -> None:
        """Raises ValueError if a client's reported number of examples is unacceptable: weights and noise depend on it."""
        most = self.config.federation.max_examples
        if not 1 <= count <= most:
            raise ValueError(f"Expected 1 to {most} examples (federation.max_examples), got {count}.")
        if self.config.privacy.unit is PrivacyUnit.example and count != (planned := self.privacy_plan[client].num_examples):
            raise ValueError(f"Expected {planned} examples, for which the noise was planned, got {count}.")

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base model, equal if server and client have the same model in the same dtype, for rows of as many texts.

        Covers embeddings, norms and all other weights without adapters; of adapted layers, whose weights may include folded updates, only
        the shapes; and all data that determines tokenization, or the vocabulary if the tokenizer is code.
        """
        adapted = {id(layer.base.weight) for layer in adapted_layers(self.model).values()}
        hashed = hashlib.sha256(json.dumps([self.spec.layers, self.data.texts]).encode())
        for name, tensor in sorted(self.model.named_parameters()):
            if id(tensor) not in adapted:
                hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        hashed.update((token_cache.rules_of(self.tokenizer) or json.dumps(sorted(self.tokenizer.get_vocab().items()))).encode())
        return hashed.hexdigest()

    @cached_property
    def links(self) -> list[Link] | None:
        """The clients' links in the simulated network, None without one."""
        return links_of(self.config, sum(parameter.numel() for parameter in self.model.parameters()))

    @cached_property
    def dropouts(self) -> list[float] | None:
        """Each client's probability of dropping out of a round, None if it is `federation.dropout` for all."""
        return dropout_rates(self.links, self.config.federation.dropout) if self.links else None

    @cached_property
    def canaries(self) -> list[Canary]:
        """The canaries of an audit; those with `inside` are part of their client's data."""
        special = set(self.tokenizer.all_special_ids)
        vocabulary = [token for token in range(len(self.tokenizer)) if token not in special]
        return canaries(self.config.audit.canaries, len(self.shards), vocabulary, self.config.seed)

    @cached_property
    def holdings(self) -> list[dict[str, int]]:
        """Number of examples of each client by task, 0 for tasks that only others have."""
        dealt = holdings(self.pool, self.shards)
        found = [{OWN_DATA: self.own_data[client]} if client in self.own_data else held for client, held in enumerate(dealt)]
        tasks = dict.fromkeys(task for held in found for task in held)
        return [{task: held.get(task, 0) for task in tasks} for held in found]

    @property
    def total_steps(self) -> int:
        """Local steps over all rounds, for a client with the average number of examples."""
        average = ceil(sum(self.own_data.get(client, len(shard)) for client, shard in enumerate(self.shards)) / len(self.shards))
        return self.config.federation.rounds * steps_per_round(average, self.config.training)

    def encode(self, examples: Sequence[AnyExample]) -> list[AnyEncoded]:
        """Returns the encoded examples, which must be of one kind."""
        return encode_any(examples, self.tokenizer, self.config.data, apart=isinstance(self.model, BiEncoder))

    @cached_property
    def _cached_tokens(self) -> list[AnyEncoded] | None:
        """The tokens of the whole pool if a file caches them; None if each client's examples are encoded on demand.

        A missing file is filled at once from the whole pool, even by a process that serves few clients, so that no later one has to.
        """
        data = self.config.data
        if not data.token_cache:
            return None
        how = (data.max_length, data.train_on.name, isinstance(self.model, BiEncoder))
        return token_cache.kept(self.pool, self.tokenizer, how, self.encode)

    def client_data(self, client: int) -> ClientData:
        """Returns the encoded examples of one client, encoded once, without those whose response lies beyond the longest sequence.

        `lengths` counts the examples left out and the truncated ones. Raises UserError if none is left.
        """
        if client not in self._clients:
            shard, cached_tokens = self.shards[client], self._cached_tokens
            encoded = [cached_tokens[i] for i in shard] if cached_tokens else self.encode([self.pool[i] for i in shard])
            kept = [example for example in encoded if not isinstance(example, EncodedExample) or has_response(example)]
            if not kept:
                longest = describe_limit(self.config.data.max_length, self.tokenizer)
                raise UserError(
                    f"data.max_length: expected room for a response of client {client}, got {longest}, which its prompts fill; "
                    "raise it or give the clients more examples."
                )
            inside: list[AnyEncoded] = [each.example for each in self.canaries if each.client == client and each.inside]
            self._clients[client] = ClientData(client, kept + inside)
            cut = [example for example in kept if isinstance(example, EncodedExample) and is_truncated(example, self._end_tokens)]
            self.lengths += Counter({"read": len(encoded), "left out": len(encoded) - len(kept), "cut": len(cut)})
        return self._clients[client]

    @cached_property
    def _end_tokens(self) -> set[int]:
        return set(end_tokens([example for example in self.pool if isinstance(example, Example)], self.tokenizer))

    # ---- the global state in this process

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def install(self, adapter: Adapter, digests: dict[str, str]) -> None:
        """Installs factors in the model; `digests` are the digests of their kinds."""
        device = self.device
        install(self.model, {name: tensor.to(device) for name, tensor in adapter.items()})
        self.digests |= digests

    def install_folded(self, folded: Adapter, tag: str) -> None:
        """Sets the base weights of the adapted layers to W + folded, or to W for layers not in `folded`; `tag` is its digest."""
        if self.digests.get(WEIGHTS, "") != tag:
            self.folded = folded
            for name, layer in adapted_layers(self.model).items():
                layer.fold(folded.get(name))
        self.digests[WEIGHTS] = tag

    def install_state(self, state: GlobalState, parts: Sequence[str] | None = None) -> None:
        """Installs the global state, or of its factors only the kinds in `parts`, skipping what is already installed."""
        self.install_folded(state.folded, state.tag)
        kinds = [kind for kind in self.spec.kinds if parts is None or kind in parts]
        missing = {kind: state.digest(kind) for kind in kinds if self.digests.get(kind) != state.digest(kind)}
        self.install(self.spec.pick(state.factors, list(missing)), missing)

    def derived_factors(self, round: int) -> Adapter | None:
        """Returns all factors of the adapted layers at the start of a round if seed and base model determine them, else None."""
        if self.method.restart is not None:
            return self.method.restart(self.spec, self.config.seed, round)
        init = self.config.adapter.init
        return DERIVED[init](self.spec, base_weights(self.model), self._epoch_seed(round)) if init in DERIVED else None

    def _epoch_seed(self, round: int) -> int:
        """Returns the seed of derived bases in a round, which changes with each refresh."""
        every, seed = self.config.adapter.refresh_every, self.config.seed
        epoch = (round - 1) // every if every else 0
        return derive_seed(seed, "refresh", epoch) if epoch else seed

    def initial_state(self, factors: Adapter) -> GlobalState:
        """Returns the state before the first round, with a new head if the factors have none."""
        scaffold = self.config.training.scaffold
        exchange = starting_exchange(self.method, self.config.adapter.init, scaffold=scaffold)
        state = GlobalState(self.spec, new_head(self.spec, self.config.seed) | factors, exchange)
        if scaffold:
            state.control = torch.zeros(self.spec.layout(self.method.uploaded(1)).num_parameters)
        return state

    # ---- clients

    def client_rank(self, client: int) -> int:
        """Returns the rank of a client's adapter."""
        return self.ranks[client] if self.ranks else self.spec.rank

    def block(self, kinds: Sequence[str], client: int) -> Tensor | None:
        """Returns the positions of the client's rank block in the flat array of `kinds`; None for all."""
        key = (tuple(kinds), self.client_rank(client))
        if key not in self._positions:
            self._positions[key] = self.spec.block(*key)
        return self._positions[key]

    def sent_positions(self, round: int, client: int) -> Tensor | None:
        """Returns the positions that the client trains and sends in a round, in the flat array of the uploaded kinds; None for all."""
        return self.trained_positions(self.method.uploaded(round), round, client)

    def trained_positions(self, kinds: Sequence[str], round: int, client: int) -> Tensor | None:
        """Returns the positions that the client trains in a round, in the flat array of `kinds`; None for all."""
        chosen = self.config.method.client_heads
        if self.method.form is not RAVAN or chosen is None:
            return self.block(kinds, client)
        drawn = numpy_generator(self.config.seed, "heads", round, client).permutation(self.spec.heads)[:chosen]
        return self.spec.head_positions(kinds, sorted(drawn.tolist()))

    def new_budget(self) -> TokenBudget:
        """Returns a fresh budget of training passes, before any reduction for lack of memory."""
        return TokenBudget.of(self.config.training, self.model, self.load)

    @property
    def gradient_budget(self) -> TokenBudget:
        """The token budget of passes for initial gradients."""
        sparing = self.config.training.activation_checkpointing or self.device.type == "cuda"
        return self._sparing_gradient_budget if sparing else self.budget

    @cached_property
    def _sparing_gradient_budget(self) -> TokenBudget:
        """Allows for the summed gradients and the inputs of all layers, which checkpointing does not reduce."""
        load = self.load.of_weight_gradients(self.gradient_parts.layout.num_parameters)
        return TokenBudget(min(self.budget.tokens, tokens_for_training(self.model, load, checkpointing=False)))

    @cached_property
    def answer_budget(self) -> TokenBudget:
        """The token budget of generation batches."""
        return TokenBudget.of_evaluation(self.config.evaluation, self.model)

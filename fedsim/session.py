"""What one process holds of an experiment: the adapted base model, the tokenizer, the data and who owns it.

The server and the workers of a simulation share it within a process, so there is one base model whatever the number of clients;
worker processes each open their own from the same configuration.
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
from fedsim.data.dealing import deal
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
from fedsim.training.budget import Load, TokenBudget, chosen
from fedsim.training.cohort import ClientData, PassFacts
from fedsim.training.encoding import end_tokens, has_response, is_cut, longest_told
from fedsim.training.labelled import encode_any
from fedsim.types import Adapter, AnyEncoded, AnyExample, EncodedExample, Example

OWN_DATA = "own data"  # in the holdings, of clients that do not say what tasks theirs has

_SOME_LABELS = ("no", "yes")
"""Stand-ins for labels that only the rows tell: their number makes no difference to the layers with an adapter."""


def check(config: Config) -> None:
    """Raises UserError where `open_session` would, as far as that is told by options, paths, first rows and the model's config.json.

    Guarantees: takes a fraction of a second; fetches and writes nothing; refuses nothing with which a session opens. What a model of the
    hub, or data from there, has to say comes when it is loaded, except for the config.json of a model that the hub's cache has.
    """
    method, config = method_of(config), effective(config)
    loaded = replace(config.model, architecture={})  # which is a claim, and a run looks at the model
    known = labels(config.data)
    classes = _SOME_LABELS if known is None else known
    check_data(config.data)
    check_model(config.model, classes)
    try:
        skeleton(loaded, classes)
    except UserError:  # its shapes are not known, or for the loader to judge
        return
    parts_of(config, adapter_of(replace(config, model=loaded), method, classes))


def open_session(config: Config) -> "Session":
    """Returns the session of this configuration; the latest one is kept, so the workers of a process find the server's."""
    text = json.dumps(to_dict(replace(config, run_dir=None, resume=False, overwrite=False)))
    if text not in _latest:
        _latest.clear()  # a GPU may not have room for the next model beside the last one
        _latest[text] = Session(from_dict(Config, json.loads(text)))
    return _latest[text]


def forget_session() -> None:
    """Makes the next session read model, data and methods anew: what a configuration names may have changed since."""
    _latest.clear()


_latest: dict[str, "Session"] = {}  # by its configuration


class Session:
    """The adapted model, the data and its partition, for a server and for the workers in its process."""

    def __init__(self, config: Config) -> None:
        keep_freed_memory()
        self.method = method_of(config)
        self.config = config = effective(config)
        self.on_pass: Callable[[PassFacts], None] = lambda facts: None
        self.data: Dataset = load(config.data, config.seed)
        self.pool, self.shards, self.public = deal(config, self.data.train)
        classes, checkpointing = self.data.labels, config.training.activation_checkpointing
        self.model, self.tokenizer = load_model(config.model, classes, self.data.texts, activation_checkpointing=checkpointing)
        adapter = config.adapter
        head = head_paths(self.model) if classes else []
        self.spec = adapt(self.model, self.method.form, adapter.rank, config.method.heads, adapter.scaling, adapter.target_modules, head)
        self.gradient_parts = parts_of(config, self.spec)  # what is sent of initial gradients
        self.ranks = deal_ranks(len(self.shards), config.federation.ranks, config.seed) if config.federation.ranks else None
        self.load = Load.of(config, self.spec, self.method)
        self.budget = self.new_budget()
        conversations.check(chain(self.data.train, *self.data.test.values()), self.tokenizer)
        self.noise_key = NoiseKey.of_seed(config.seed) if config.privacy.noise is NoiseSource.seed else NoiseKey.secret()
        self.digests: dict[str, str] = {}  # of the parts of the global state that are installed in the model
        self.folded: Adapter = {}  # what has been added to the base weights, on the CPU
        self.own_data: dict[int, int] = {}  # numbers of examples of clients that have brought data of their own
        self.lengths: Counter[str] = Counter()  # of clients' examples so far: "read", of them "left out" and "cut", see `client_data`
        self._clients: dict[int, ClientData] = {}
        self._positions: dict[tuple[tuple[str, ...], int], Tensor | None] = {}

    @cached_property
    def privacy_plan(self) -> list[ClientPlan]:
        """What every client's training costs; empty where nothing is claimed. Calibration takes seconds."""
        if self.config.privacy.unit is PrivacyUnit.none:
            return []
        clients = range(len(self.shards))
        return plan(self.config, [self.own_data.get(client) or len(self.client_data(client).examples) for client in clients])

    def hear(self, own_data: dict[int, int]) -> None:
        """Notes the numbers of examples of clients that train on data of their own instead of the shards dealt here."""
        self.own_data = own_data
        self.__dict__.pop("privacy_plan", None)
        self.__dict__.pop("holdings", None)

    def check_num_examples(self, client: int, count: int) -> None:
        """Raises ValueError for a client's own number of examples if it is not to be believed: weights and noise hang on it."""
        most = self.config.federation.max_examples
        if not 1 <= count <= most:
            raise ValueError(f"Expected 1 to {most} examples (federation.max_examples), got {count}.")
        if self.config.privacy.unit is PrivacyUnit.example and count != (planned := self.privacy_plan[client].num_examples):
            raise ValueError(f"Expected {planned} examples, for which the noise was planned, got {count}.")

    @cached_property
    def base_digest(self) -> str:
        """Digest of the base model, equal where server and client hold the same one in the same type, for rows of as many texts.

        Of embeddings, norms and whatever has no adapter; adapted layers may have something folded in, so their shapes must do. With
        all that decides what the tokenizer makes of a text, or its vocabulary where that is code.
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
        """The clients' links of a simulated network, None without one."""
        return links_of(self.config, sum(parameter.numel() for parameter in self.model.parameters()))

    @cached_property
    def dropouts(self) -> list[float] | None:
        """Each client's probability of vanishing in a round, None where it is `federation.dropout` for all."""
        return dropout_rates(self.links, self.config.federation.dropout) if self.links else None

    @cached_property
    def canaries(self) -> list[Canary]:
        """The canaries of an audit; those that are inside belong to their client's data."""
        special = set(self.tokenizer.all_special_ids)
        vocabulary = [token for token in range(len(self.tokenizer)) if token not in special]
        return canaries(self.config.audit.canaries, len(self.shards), vocabulary, self.config.seed)

    @cached_property
    def holdings(self) -> list[dict[str, int]]:
        """Number of examples of each client by task, 0 of those that others have."""
        dealt = holdings(self.pool, self.shards)
        found = [{OWN_DATA: self.own_data[client]} if client in self.own_data else held for client, held in enumerate(dealt)]
        tasks = dict.fromkeys(task for held in found for task in held)
        return [{task: held.get(task, 0) for task in tasks} for held in found]

    @property
    def total_steps(self) -> int:
        """Local steps over all rounds of a client with the average number of examples."""
        average = ceil(sum(self.own_data.get(client, len(shard)) for client, shard in enumerate(self.shards)) / len(self.shards))
        return self.config.federation.rounds * steps_per_round(average, self.config.training)

    def encode(self, examples: Sequence[AnyExample]) -> list[AnyEncoded]:
        """Returns the tokens of the examples, which are of one kind."""
        return encode_any(examples, self.tokenizer, self.config.data, apart=isinstance(self.model, BiEncoder))

    @cached_property
    def _kept_tokens(self) -> list[AnyEncoded] | None:
        """The tokens of the whole pool, where a file keeps them; None where those of each client are made as it is asked for.

        With a file the whole pool is encoded at once, also by a process that serves a few clients: it is the last one that has to.
        """
        data = self.config.data
        if not data.token_cache:
            return None
        how = (data.max_length, data.train_on.name, isinstance(self.model, BiEncoder))
        return token_cache.kept(self.pool, self.tokenizer, how, self.encode)

    def client_data(self, client: int) -> ClientData:
        """Returns the encoded examples of one client, encoded once, without those whose response lies beyond the longest sequence.

        Raises UserError where none is left. How many that are, and of how many others the end is cut off, is counted in `lengths`.
        """
        if client not in self._clients:
            shard, kept_tokens = self.shards[client], self._kept_tokens
            encoded = [kept_tokens[i] for i in shard] if kept_tokens else self.encode([self.pool[i] for i in shard])
            kept = [example for example in encoded if not isinstance(example, EncodedExample) or has_response(example)]
            if not kept:
                longest = longest_told(self.config.data.max_length, self.tokenizer)
                raise UserError(
                    f"data.max_length: expected room for a response of client {client}, got {longest}, which its prompts fill; "
                    "raise it or give the clients more examples."
                )
            inside: list[AnyEncoded] = [each.example for each in self.canaries if each.client == client and each.inside]
            self._clients[client] = ClientData(client, kept + inside)
            cut = [example for example in kept if isinstance(example, EncodedExample) and is_cut(example, self._ends)]
            self.lengths += Counter({"read": len(encoded), "left out": len(encoded) - len(kept), "cut": len(cut)})
        return self._clients[client]

    @cached_property
    def _ends(self) -> set[int]:
        return set(end_tokens([example for example in self.pool if isinstance(example, Example)], self.tokenizer))

    # ---- the global state in this process

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def install(self, adapter: Adapter, digests: dict[str, str]) -> None:
        """Puts factors into the model; `digests` are those of their kinds."""
        device = self.device
        install(self.model, {name: tensor.to(device) for name, tensor in adapter.items()})
        self.digests |= digests

    def install_folded(self, folded: Adapter, tag: str) -> None:
        """Makes W + folded the base weights of the adapted layers, W alone where nothing is folded; `tag` is the digest of it."""
        if self.digests.get(WEIGHTS, "") != tag:
            self.folded = folded
            for name, layer in adapted_layers(self.model).items():
                layer.fold(folded.get(name))
        self.digests[WEIGHTS] = tag

    def install_state(self, state: GlobalState, parts: Sequence[str] | None = None) -> None:
        """Puts the whole global state into the model, or of its factors those of the kinds in `parts`, as far as it is not there."""
        self.install_folded(state.folded, state.tag)
        kinds = [kind for kind in self.spec.kinds if parts is None or kind in parts]
        missing = {kind: state.digest(kind) for kind in kinds if self.digests.get(kind) != state.digest(kind)}
        self.install(self.spec.pick(state.factors, list(missing)), missing)

    def derived_factors(self, round: int) -> Adapter | None:
        """Returns all factors of the adapted layers at the start of a round where seed and base model give them, None where they do not."""
        if self.method.restart is not None:
            return self.method.restart(self.spec, self.config.seed, round)
        init = self.config.adapter.init
        return DERIVED[init](self.spec, base_weights(self.model), self._epoch_seed(round)) if init in DERIVED else None

    def _epoch_seed(self, round: int) -> int:
        """Bases from a seed are other ones after each refresh."""
        every, seed = self.config.adapter.refresh_every, self.config.seed
        epoch = (round - 1) // every if every else 0
        return derive_seed(seed, "refresh", epoch) if epoch else seed

    def initial_state(self, factors: Adapter) -> GlobalState:
        """Returns the state before the first round; a head that is not among the factors is a new one."""
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
        """Returns the positions in the flat array of `kinds` of what the client's rank holds; None for all."""
        key = (tuple(kinds), self.client_rank(client))
        if key not in self._positions:
            self._positions[key] = self.spec.block(*key)
        return self._positions[key]

    def sent_positions(self, round: int, client: int) -> Tensor | None:
        """Returns the positions in the flat array of the uploaded kinds of what the client trains and sends in a round; None for all."""
        return self.trained_positions(self.method.uploaded(round), round, client)

    def trained_positions(self, kinds: Sequence[str], round: int, client: int) -> Tensor | None:
        """Returns the positions in the flat array of `kinds` of what the client trains in a round; None for all."""
        chosen = self.config.method.client_heads
        if self.method.form is not RAVAN or chosen is None:
            return self.block(kinds, client)
        drawn = numpy_generator(self.config.seed, "heads", round, client).permutation(self.spec.heads)[:chosen]
        return self.spec.head_positions(kinds, sorted(drawn.tolist()))

    def new_budget(self) -> TokenBudget:
        """Returns the budget of training passes, as if memory had never run out."""
        return TokenBudget.of(self.config.training, self.model, self.load)

    @property
    def gradient_budget(self) -> TokenBudget:
        """The budget of passes for initial gradients."""
        sparing = self.config.training.activation_checkpointing or self.device.type == "cuda"
        return self._sparing_gradient_budget if sparing else self.budget

    @cached_property
    def _sparing_gradient_budget(self) -> TokenBudget:
        """A GPU holds their sums and what the layers are given besides; checkpointing spares nothing there."""
        load = self.load.of_weight_gradients(self.gradient_parts.layout.num_parameters)
        return TokenBudget(min(self.budget.tokens, chosen(self.model, load, checkpointing=False)))

    @cached_property
    def answer_budget(self) -> TokenBudget:
        """The budget of generation batches."""
        return TokenBudget.of_evaluation(self.config.evaluation, self.model)

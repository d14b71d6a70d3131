"""What one process holds of an experiment: the adapted base model, the tokenizer, the data and who owns it.

The server and the workers of a simulation share it within a process, so there is one base model whatever the number of clients;
worker processes each open their own from the same configuration.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from math import ceil

from torch import Tensor

from fedsim.config import Config, Init, from_dict, to_dict
from fedsim.core import initialization
from fedsim.core.adapters import adapt, adapted_layers, factors, install
from fedsim.core.methods import METHODS, Method
from fedsim.core.partition import holdings, partition
from fedsim.core.payload import Layout, digest
from fedsim.data import Dataset, load
from fedsim.errors import UserError, nearest
from fedsim.models import load_model
from fedsim.seeding import numpy_generator
from fedsim.training.batches import steps_per_round
from fedsim.training.cohort import ClientData, LocalResult, PassFacts, train_cohort
from fedsim.training.encoding import encode, has_response
from fedsim.training.gradients import weight_gradients
from fedsim.training.optimizers import learning_rate
from fedsim.types import Adapter, EncodedExample, Example

DERIVED = {Init.weight_svd: initialization.from_weights, Init.orthogonal: initialization.from_seed}


def effective(config: Config) -> Config:
    """Returns the configuration that is carried out: a pooled method has one client, whose batch is the union of all clients' batches."""
    method = method_of(config)
    if not method.pooled:
        return config
    federation = replace(config.federation, clients=1, fraction=1.0)
    training = replace(config.training, batch_size=config.training.batch_size * config.federation.clients)
    return replace(config, federation=federation, training=training)


def method_of(config: Config) -> Method:
    """Returns the method that the configuration names. Raises UserError for an unknown one."""
    if config.method.name not in METHODS:
        raise UserError(
            f"method.name: expected one of {', '.join(METHODS)}, got {config.method.name!r}.{nearest(config.method.name, list(METHODS))}"
        )
    return METHODS[config.method.name]


def open_session(config: Config) -> "Session":
    """Returns the session of this configuration; the latest one is kept, so the workers of a process find the server's."""
    return _open(json.dumps(to_dict(replace(config, run_dir=None, resume=False, overwrite=False))))


@lru_cache(maxsize=1)
def _open(text: str) -> "Session":
    return Session(from_dict(Config, json.loads(text)))


class Session:
    """The adapted model, the data and its partition, for a server and for the workers in its process."""

    def __init__(self, config: Config) -> None:
        self.method = method_of(config)
        self.config = effective(config)
        self.on_pass: Callable[[PassFacts], None] = lambda facts: None
        self.data: Dataset = load(config.data, config.seed)
        self.pool, self.public = self._split_public(self.data.train)
        self.shards = partition(self.pool, self.config.federation, config.seed)
        self.model, self.tokenizer = load_model(config.model, activation_checkpointing=config.training.activation_checkpointing)
        adapt(self.model, config.adapter.rank, config.adapter.scaling, config.adapter.target_modules)
        self.rank = next(iter(adapted_layers(self.model).values())).R.shape[-1]
        self.layout = Layout.of(factors(self.model, self.method.trained))
        self.bases_layout = Layout.of(initialization.bases_of(factors(self.model, ("B", "A"))))
        self.bases_digest = ""  # of the bases that are installed in the model
        self.num_too_long = 0  # examples left out so far because nothing of their response is within data.max_length
        self._encoded: dict[int, list[EncodedExample]] = {}

    def _split_public(self, train: list[Example]) -> tuple[list[Example], list[Example]]:
        """With public initialisation the server holds a sample that no client owns."""
        if self.config.adapter.init is not Init.gradient_public:
            return train, []
        order = numpy_generator(self.config.seed, "public").permutation(len(train))
        count = self.config.adapter.init_samples
        if count >= len(train):
            raise UserError(f"adapter.init_samples: expected fewer than the {len(train)} training examples, got {count}.")
        public = set(order[:count].tolist())
        return [e for i, e in enumerate(train) if i not in public], [train[i] for i in sorted(public)]

    @cached_property
    def holdings(self) -> list[dict[str, int]]:
        """Number of examples of each client by task."""
        return holdings(self.pool, self.shards)

    @property
    def total_steps(self) -> int:
        """Local steps over all rounds of a client with the average number of examples."""
        average = ceil(len(self.pool) / len(self.shards))
        return self.config.federation.rounds * steps_per_round(average, self.config.training)

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Returns the tokens of the examples."""
        data = self.config.data
        return [encode(example, self.tokenizer, data.max_length, data.train_on) for example in examples]

    def client_data(self, client: int) -> ClientData:
        """Returns the encoded examples of one client, encoded once, without those whose response lies beyond `data.max_length`.

        Raises UserError where none is left.
        """
        if client not in self._encoded:
            encoded = self.encode([self.pool[i] for i in self.shards[client]])
            kept = [example for example in encoded if has_response(example)]
            if not kept:
                raise UserError(
                    f"data.max_length: expected room for a response of client {client}, got {self.config.data.max_length} tokens, "
                    "which its prompts fill; raise it or give the clients more examples."
                )
            self._encoded[client] = kept
            self.num_too_long += len(encoded) - len(kept)
        return ClientData(client, self._encoded[client])

    def train(self, start: Tensor, clients: Sequence[int], round: int) -> list[LocalResult]:
        """Trains the clients from the flat factors `start` for one round, as one cohort."""
        return train_cohort(
            self.model,
            start,
            self.layout,
            [self.client_data(client) for client in clients],
            self.config.training,
            pad_id=self.tokenizer.pad_token_id,
            seed=self.config.seed,
            round=round,
            rounds=self.config.federation.rounds,
            on_pass=self.on_pass,
        )

    def weight_gradients(self, examples: Sequence[EncodedExample]) -> Adapter:
        """Returns the summed loss gradient of every adapted base weight over the examples, with the update R at zero."""
        return weight_gradients(
            self.model, examples, pad_id=self.tokenizer.pad_token_id, tokens_per_pass=self.config.training.tokens_per_pass
        )

    def client_gradient(self, client: int, num_samples: int) -> Tensor:
        """Returns the flat weight gradients of a seeded sample of the client's own examples."""
        examples = self.client_data(client).examples
        chosen = numpy_generator(self.config.seed, "init", client).choice(len(examples), min(num_samples, len(examples)), replace=False)
        gradients = self.weight_gradients([examples[i] for i in chosen])
        return Layout.of(gradients).pack(gradients).cpu()

    @property
    def gradient_layout(self) -> Layout:
        """Layout of the flat weight gradients."""
        layers = adapted_layers(self.model)
        shapes = tuple((layer.B.shape[0], layer.A.shape[1]) for layer in layers.values())
        return Layout(tuple(layers), shapes)

    def bases_from_gradients(self, gradients: Adapter) -> Adapter:
        """Returns B, R, A of the first full fine-tuning step along the summed gradients."""
        eta = learning_rate(0, self.total_steps, self.config.training)
        return initialization.from_gradients(adapted_layers(self.model), gradients, eta, self.config.seed)

    def derive_bases(self) -> Adapter:
        """Returns B, R, A of an initialisation that needs no data; every party derives the same."""
        return DERIVED[self.config.adapter.init](adapted_layers(self.model), self.config.seed)

    def install_bases(self, bases: Adapter) -> str:
        """Puts B and A into the model and returns their digest."""
        device = next(self.model.parameters()).device
        install(self.model, {name: tensor.to(device) for name, tensor in bases.items()})
        self.bases_digest = digest(bases)
        return self.bases_digest

    def install_factors(self, flat: Tensor) -> None:
        """Puts flat trained factors into the model, for evaluation and export."""
        device = next(self.model.parameters()).device
        install(self.model, self.layout.unpack(flat.to(device)))

"""The workloads of the comparisons: models, adapters and tokens that are equal for all competitors.

Sequences are random tokens of one length with the loss on every position, so that no competitor pads and all do the same work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.calibration import PROXY
from fedsim.choices import Schedule
from fedsim.config import ModelConfig, TrainingConfig
from fedsim.core.adapters import adapt, factors, install
from fedsim.core.forms import LORA_SB, AdapterSpec
from fedsim.core.initialization import from_seed
from fedsim.core.payload import Layout
from fedsim.models import EMBEDDED, load_model
from fedsim.seeding import NoiseKey, numpy_generator
from fedsim.shapes import random_model
from fedsim.training.budget import Load, TokenBudget
from fedsim.training.cohort import ClientData, train_cohort
from fedsim.training.private import PrivateRule
from fedsim.types import EncodedExample

PAD = 0


def _llama(hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate, "num_attention_heads": hidden // 32}
    return {"model_type": "llama", "vocab_size": 2272, "max_position_embeddings": 512, "tie_word_embeddings": True, **sizes}


ARCHITECTURES = {"tiny": _llama(64, 2, 128), "llama_4m": _llama(256, 4, 688), "llama_20m": PROXY, "llama_87m": _llama(768, 12, 2048)}
"""Models with random weights, by name; `embedded` is the one inside the package."""


@dataclass(frozen=True)
class Workload:
    """One round: every client takes `steps` steps of `batch` sequences of `tokens` tokens."""

    model: str
    clients: int
    batch: int
    tokens: int
    steps: int
    rank: int = 16

    @property
    def num_tokens(self) -> int:
        """Tokens of all clients."""
        return self.clients * self.batch * self.tokens * self.steps

    @property
    def training(self) -> TrainingConfig:
        """AdamW at a constant rate, the same for all competitors."""
        return TrainingConfig(
            batch_size=self.batch,
            local_steps=self.steps,
            learning_rate=1e-3,
            schedule=Schedule.constant,
            warmup_ratio=0.0,
        )

    def client(self, number: int, vocabulary: int) -> ClientData:
        """Returns a client with as many sequences as it will see in the round."""
        generator = numpy_generator(0, "benchmark", number)
        ids = generator.integers(3, vocabulary, (self.batch * self.steps, self.tokens))
        return ClientData(number, [EncodedExample(row, 1) for row in ids.astype(np.int32)])

    def all_clients(self, vocabulary: int, most: int | None = None) -> list[ClientData]:
        """Returns all clients, or the first `most`."""
        return [self.client(number, vocabulary) for number in range(min(self.clients, most or self.clients))]


@dataclass(frozen=True)
class Subject:
    """A model with LoRA-SB adapters, of which R trains."""

    model: nn.Module
    spec: AdapterSpec

    @property
    def layout(self) -> Layout:
        """Layout of the trained factors."""
        return self.spec.layout(("R",))

    @property
    def start(self) -> Tensor:
        """The flat R at the start of the round."""
        return self.spec.pack(factors(self.model, ("R",)), ("R",))

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]


def base_model(name: str) -> nn.Module:
    """Returns a frozen base model in float32 on the CPU: the embedded one, or one of `ARCHITECTURES` with seeded random weights."""
    if name == "embedded":
        return load_model(ModelConfig(device="cpu"))[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return random_model(ModelConfig(architecture=dict(ARCHITECTURES[name])), torch.device("cpu"))


def save_base_model(name: str, folder: Path) -> None:
    """Writes a model of the workloads with the embedded tokenizer, for use as `model.path`."""
    from transformers import AutoTokenizer

    base_model(name).save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(str(EMBEDDED)).save_pretrained(folder)


@lru_cache(maxsize=1)
def subject(name: str, rank: int) -> Subject:
    """Returns the adapted model; the last one is kept."""
    return adapted(base_model(name), rank)


def adapted(model: nn.Module, rank: int) -> Subject:
    """Puts LoRA-SB adapters with seeded orthonormal bases into the model."""
    spec = adapt(model, LORA_SB, rank, 1, 1.0, [])
    device = next(model.parameters()).device
    install(model, {name: tensor.to(device) for name, tensor in from_seed(spec, {}, 0).items()})
    return Subject(model, spec)


def train(on: Subject, clients: Sequence[ClientData], training: TrainingConfig, noise: float | None = None) -> int:
    """Trains the clients as one cohort, with DP-SGD where `noise` is given, and returns the number of tokens that passed."""
    passed: list[int] = []
    units, rows = (len(clients) * training.batch_size, 1) if noise else (len(clients), training.batch_size)
    train_cohort(
        on.model,
        on.start,
        on.layout,
        clients,
        training,
        pad_id=PAD,
        seed=0,
        round=1,
        rounds=1,
        private=None if noise is None else PrivateRule(1.0, (noise,) * len(clients), NoiseKey.of_seed(0)),
        budget=TokenBudget.of(training, on.model, Load(on.spec, ("R",), units, rows)),
        on_pass=lambda facts: passed.append(facts.num_tokens),
    )
    return sum(passed)


def train_one_by_one(on: Subject, clients: Sequence[ClientData], training: TrainingConfig) -> int:
    """Trains the clients one after another in this process, by the same code, and returns the number of tokens."""
    return sum(train(on, [client], training) for client in clients)

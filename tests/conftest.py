"""Tiny models of every architecture, seeded examples, and helpers that tests share."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from fedsim.config import TrainingConfig
from fedsim.core.adapters import adapt, factors, install
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.forms import HEAD, LORA_SB
from fedsim.core.initialization import from_seed, new_head
from fedsim.core.payload import Layout
from fedsim.errors import UserError
from fedsim.models import head_paths, prepare
from fedsim.training.cohort import ClientData, LocalResult, train_cohort
from fedsim.training.private import PrivateRule
from fedsim.types import EncodedExample, EncodedLabelled

settings.register_profile("fedsim", deadline=None)  # loaded machines are slow, and these tests are not about time
settings.load_profile("fedsim")
torch.set_num_threads(1)  # on models this small a second thread costs more than it gains


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs except with `-m gpu`: oracles run on the CPU, and a process that has probed for a GPU cannot be forked."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: pytest -m gpu on a machine with one")


VOCABULARY = 50
ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "gpt2", "bert")


def tiny_model(architecture: str, *, seed: int = 0, activation_checkpointing: bool = False) -> nn.Module:
    """A two-layer causal model with random weights; grouped-query attention where the architecture has it, GPT-2 with Conv1D."""
    from transformers import AutoModelForCausalLM, BertConfig, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {"num_key_value_heads": 2}
    configs = {
        "llama": lambda: LlamaConfig(**sizes, **ids, **grouped, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**sizes, **ids, **grouped),
        "qwen2": lambda: Qwen2Config(**sizes, **ids, **grouped),
        "gemma": lambda: GemmaConfig(**sizes, **ids, **grouped, head_dim=8),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids),
        "bert": lambda: BertConfig(**sizes, **ids, is_decoder=True),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configs[architecture]())
    return prepare(model, torch.device("cpu"), activation_checkpointing=activation_checkpointing)


def adapted_model(architecture: str = "llama", rank: int = 8, **options: bool) -> nn.Module:
    """A tiny model with adapters whose B and A are orthonormal and whose R is random."""
    model = tiny_model(architecture, **options)  # type: ignore[arg-type]
    spec = adapt(model, LORA_SB, rank, 1, 1.0, [])
    factors = from_seed(spec, {}, seed=0)
    generator = torch.Generator().manual_seed(1)
    install(model, {k: torch.randn(v.shape, generator=generator) * 0.1 if k.endswith(".R") else v for k, v in factors.items()})
    return model


@pytest.fixture
def sequences() -> Callable[..., list[EncodedExample]]:
    """Makes `count` random token sequences of 6 to 13 tokens with the loss from the third token on."""

    def make(count: int, seed: int = 0) -> list[EncodedExample]:
        rng = random.Random(seed)
        return [EncodedExample(tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(6, 14))), 3) for _ in range(count)]

    return make


# ---- classifiers

LABELS = ("entailment", "neutral", "contradiction")
CLASSIFIERS = ("bert", "roberta", "distilbert")


def tiny_classifier(architecture: str = "bert", *, seed: int = 0, activation_checkpointing: bool = False) -> nn.Module:
    """A two-layer encoder with random weights and a classification head; "apart" is a BERT that encodes the two texts separately."""
    from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig, RobertaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "id2label": dict(enumerate(LABELS))}
    configs = {
        "bert": lambda: BertConfig(**sizes, **ids),
        "roberta": lambda: RobertaConfig(**sizes, **ids, type_vocab_size=1),
        "apart": lambda: BertConfig(**sizes, **ids),
        "distilbert": lambda: DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, **ids),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(configs[architecture]())
    model = prepare(model, torch.device("cpu"), activation_checkpointing=activation_checkpointing)
    return BiEncoder(model) if architecture == "apart" else model


def adapted_classifier(architecture: str = "bert", rank: int = 8, **options: bool) -> nn.Module:
    """A tiny classifier with a new head, and adapters whose B and A are orthonormal and whose R is random."""
    model = tiny_classifier(architecture, **options)  # type: ignore[arg-type]
    spec = adapt(model, LORA_SB, rank, 1, 1.0, [], head_paths(model))
    generator = torch.Generator().manual_seed(1)
    factors = new_head(spec, seed=0) | from_seed(spec, {}, seed=0)
    start = {k: torch.randn(v.shape, generator=generator) * 0.1 if k.endswith(".R") else v for k, v in factors.items()}
    install(model, {k: 10 * v if k.endswith(".head") else v for k, v in start.items()})  # else hardly any gradient reaches R
    return model


@pytest.fixture
def pairs() -> Callable[..., list[EncodedLabelled]]:
    """Makes `count` random pairs of 6 to 13 tokens, optionally without segments, or with a split for separate encoding."""

    def make(count: int, seed: int = 0, segments: bool = True, apart: bool = False) -> list[EncodedLabelled]:
        rng, made = random.Random(seed), []
        for _ in range(count):
            length, first = rng.randrange(6, 14), rng.randrange(2, 5)
            ids = tuple(rng.randrange(3, VOCABULARY) for _ in range(length))
            segment_ids = (0,) * first + (1,) * (length - first) if segments and not apart else ()
            made.append(EncodedLabelled(ids, segment_ids, rng.randrange(len(LABELS)), first if apart else 0))
        return made

    return make


KINDS = ("R", HEAD)
"""The kinds of factors that these classifiers train."""


def own_leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    """Replaces every R and head of an adapted classifier with an autograd leaf, and returns the leaves by name."""
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in factors(model, KINDS).items()}
    for name, leaf in leaves.items():
        path, _, kind = name.rpartition(".")
        setattr(model.get_submodule(path), kind, leaf)
    return leaves


def train_pairs(model: nn.Module, clients: list[ClientData], private: PrivateRule | None = None, **options: Any) -> list[LocalResult]:
    """Trains a cohort of an adapted classifier for three steps of four pairs."""
    current = factors(model, KINDS)
    layout = Layout.of(current)
    training = TrainingConfig(**{"batch_size": 4, "local_steps": 3, "tokens_per_pass": 60, "learning_rate": 1e-2, **options})
    start = layout.pack(current)
    return train_cohort(model, start, layout, clients, training, pad_id=0, seed=0, round=1, rounds=1, private=private)


def save_classifier(folder: Path) -> str:
    """Writes a tiny BERT without a head and a tokenizer of the words w0 to w44, as a user would have them on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    words = Tokenizer(models.WordLevel(special | {f"w{i}": 4 + i for i in range(VOCABULARY - 5)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tiny_classifier().bert.save_pretrained(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names).save_pretrained(folder)
    return str(folder)


def write_sick(path: Path, count: int = 40) -> str:
    """Writes pairs of made-up words in SICK's form: the label depends on the lengths of both texts."""
    rng = random.Random(0)
    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"]
    for i in range(count):
        first, second = (" ".join(f"w{rng.randrange(45)}" for _ in range(rng.randrange(2, 6))) for _ in range(2))
        label = LABELS[(len(first) + len(second)) % 3].upper()
        lines.append(f"{i}\t{first}\t{second}\t3.0\t{label}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def refusal(call, *arguments):
    """Returns the message of the UserError that the call raises, or None."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return None


class WithLinearR(nn.Module):
    """An adapted layer as Opacus needs it: R is the weight of a Linear."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer.base
        self.register_buffer("B", layer.B)
        self.register_buffer("A", layer.A)
        self.R = nn.Linear(layer.R.shape[1], layer.R.shape[0], bias=False)
        self.R.weight.data = layer.R.clone()

    def forward(self, x):
        return self.base(x) + self.R(x @ self.A.T) @ self.B.T


def unreachable_entries(released, before):
    """Counts the entries in which no float32 noise leads from `before` to `released`: the attack of Mironov, CCS 2012."""
    noise = (released.double() - before.double()).float()
    near = (noise, *(torch.nextafter(noise, torch.full_like(noise, side)) for side in (float("-inf"), float("inf"))))
    return int((~torch.stack([before + each == released for each in near]).any(0)).sum())


def take_private_steps(private, optimizer, trained, batches, inputs):
    """Takes the steps of genuine Opacus, one example at a time: no padding, no other row. `inputs(i)` are the model's arguments."""
    for batch in batches:
        optimizer.zero_grad()
        for i in batch:
            private(**inputs(i)).loss.backward()
            optimizer.signal_skip_step(True)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.signal_skip_step(False)
        for parameter in trained:
            parameter.grad_sample = torch.zeros(0, *parameter.shape)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in trained]).float()

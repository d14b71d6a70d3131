"""Tiny models of every architecture, and seeded token sequences."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedsim.core.adapters import adapt, install
from fedsim.core.forms import LORA_SB
from fedsim.core.initialization import from_seed
from fedsim.models import prepare
from fedsim.types import EncodedExample

torch.set_num_threads(1)  # the models are so small that two threads cost more than they bring

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

"""Trains the embedded base model on text that the project generates: `python experiments/base_model/train.py`.

Runs in one process on the CPU, seeded, continues from its last checkpoint when restarted, and writes the model and its tokenizer to
fedsim/embedded/base_model. MODEL_CARD.md next to this file has the cost and the results.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from muon import Muon
from torch import Tensor

from fedsim.embedded import BASE_MODEL, corpus, tokenizer
from fedsim.seeding import derive_seed

PART = 4000
"""Number of documents that are generated and packed into rows at a time."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on."""

    seed: int = 0
    cycles: tuple[int, ...] = (3200, 4700, 5700)
    rows: int = 32
    length: int = 128
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    matrix_rate: float = 0.02
    vector_rate: float = 0.003
    warmup: int = 100
    decay: float = 0.45
    bfloat16_from: int = 200

    def rate(self, step: int) -> float:
        """Returns the learning rate's factor: per cycle a warm-up, a plateau, and a linear decay to zero over its last fraction `decay`."""
        first, last = next((first, last) for first, last in pairwise((0, *self.cycles)) if step < last)
        return min(1.0, (step - first + 1) / self.warmup, (last - step) / (self.decay * (last - first)))


def make_tokenizer(recipe: Recipe) -> Any:
    """Returns the tokenizer, with the words of the generated text and of the tasks."""
    return tokenizer.build(corpus.vocabulary(recipe.seed))


def make_model(recipe: Recipe, words: Any) -> Any:
    """Returns the untrained Llama with tied embeddings.

    Queries start equal to keys, and outputs as transposed values: every head starts by copying from similar tokens, and learns to look back
    in a tenth of the steps (mimetic initialisation, arXiv 2305.09828, with the sign that copies).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(derive_seed(recipe.seed, "base model"))  # transformers initialises from the global generator only
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    for layer in model.model.layers:
        heads = layer.self_attn
        for projection in (heads.q_proj, heads.v_proj):
            torch.nn.init.normal_(projection.weight, std=recipe.hidden**-0.5)
        with torch.no_grad():
            heads.k_proj.weight.copy_(heads.q_proj.weight)
            heads.o_proj.weight.copy_(0.5 * heads.v_proj.weight.T)
    return model


def batches(recipe: Recipe, words: Any, part: int, row: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yields batches [rows, length] from batch `row` of part `part` on, each with the position of the next."""
    size = recipe.rows * recipe.length
    while True:
        ids = [t for row_ids in words(list(corpus.documents(recipe.seed, part, PART)))["input_ids"] for t in (*row_ids, words.eos_token_id)]
        for i in range(row, len(ids) // size):
            yield part, i + 1, torch.tensor(ids[i * size : (i + 1) * size]).view(recipe.rows, recipe.length)
        part, row = part + 1, 0


def optimizers(recipe: Recipe, model: Any) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the blocks and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, rate=recipe.matrix_rate), adam]


def save_checkpoint(path: Path, step: int, at: tuple[int, int], model: Any, optims: list[torch.optim.Optimizer]) -> None:
    """Writes model, optimizers and the position in the text atomically."""
    state = {"step": step, "at": at, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optims]}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(recipe: Recipe, work: Path, every: int) -> tuple[Any, Any]:
    """Returns the trained model and its tokenizer; writes a checkpoint to `work` every `every` steps."""
    work.mkdir(parents=True, exist_ok=True)
    words = make_tokenizer(recipe)
    model = make_model(recipe, words).train()
    optims = optimizers(recipe, model)
    bases = [group["lr"] for o in optims for group in o.param_groups]
    start, at, checkpoint = 0, (0, 0), work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start, at = state["step"], state["at"]
        model.load_state_dict(state["model"])
        for o, saved in zip(optims, state["optimizers"], strict=True):
            o.load_state_dict(saved)
    begin, mean = time.perf_counter(), 0.0
    for step, (part, row, rows) in zip(range(start, recipe.cycles[-1]), batches(recipe, words, *at), strict=False):
        for group, base in zip((g for o in optims for g in o.param_groups), bases, strict=True):
            group["lr"] = base * recipe.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=step >= recipe.bfloat16_from):
            logits = model(input_ids=rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        for o in optims:
            o.step()
            o.zero_grad()
        mean = loss.item() if step == start else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) * rows.numel() / (time.perf_counter() - begin)
            print(f"step {step + 1}/{recipe.cycles[-1]} loss {mean:.4f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % every == 0:
            save_checkpoint(checkpoint, step + 1, (part, row), model, optims)
    return model.eval(), words


def export(model: Any, words: Any, recipe: Recipe, folder: Path) -> None:
    """Writes model (in half precision, for size), tokenizer and recipe in Hugging Face format."""
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/base_model"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=BASE_MODEL, help="folder of the finished model")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    recipe = Recipe()
    model, words = train(recipe, arguments.work, arguments.every)
    export(model, words, recipe, arguments.out)


if __name__ == "__main__":
    main()

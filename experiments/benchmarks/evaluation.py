"""Section f: greedy generation of the test answers against `model.generate` of transformers in batches."""

from typing import Any

import torch

from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Task, interleaved, medians, ratio
from fedsim.config import DataConfig, EvaluationConfig, ModelConfig
from fedsim.data import load
from fedsim.models import load_model
from fedsim.training.budget import TokenBudget
from fedsim.training.encoding import encode_prompts
from fedsim.training.evaluation import generate
from fedsim.types import Example

NEW_TOKENS = 96


def cases(settings: Settings) -> list[Case]:
    """Returns the questions and the batch size of `model.generate` of every row."""
    return [{"questions": 64, "batch": 16}] if settings.quick else [{"questions": 256, "batch": batch} for batch in (1, 16, 64)]


def measure(case: Case, settings: Settings) -> Found:
    """Measures both in turns on the same questions, in tokens of the answers up to their end."""
    model, tokenizer = load_model(ModelConfig())
    each = case["questions"] // 2
    tests = load(DataConfig(train_examples=100), 0).test.values()
    prompts = list(encode_prompts([one for examples in tests for one in examples[:each] if isinstance(one, Example)], tokenizer))
    if case["batch"] == 1:
        prompts = prompts[:: max(1, len(prompts) // 32)]  # one by one is slow
    tokenizer.padding_side = "left"
    answers: dict[str, list[list[int]]] = {}

    def ours() -> float:
        found = generate(
            model,
            prompts,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=NEW_TOKENS,
            budget=TokenBudget.of_evaluation(EvaluationConfig(), model),
        )
        answers["ours"] = [answer.tokens for answer in found]
        return sum(map(len, answers["ours"]))

    def theirs() -> float:
        answers["theirs"] = _generate(model, tokenizer, prompts, case["batch"])
        return sum(map(len, answers["theirs"]))

    tasks: dict[str, Task] = {"ours": ours, "theirs": theirs}
    rates = interleaved(tasks, turns=3, seconds=settings.seconds)
    equal = sum(a == b for a, b in zip(answers["ours"], answers["theirs"], strict=True)) / len(prompts)
    return medians(rates) | {"ratio": ratio(rates, "ours", "theirs"), "equal": 100 * equal}


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], batch: int) -> list[list[int]]:
    answers = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(
                **{name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")},
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            answers.append(row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row)
    return answers


SECTION = Section(
    "f",
    "Evaluation",
    "Tokens of answers per second, the embedded model on its own test questions in the order of the data, up to 96 new tokens, greedy. "
    "*generate*: `model.generate` in batches of this size, padded on the left. *equal*: answers that agree token for token.",
    (
        Column("batch of generate", "batch"),
        Column("fedsim", "ours", "{:,.0f}"),
        Column("generate", "theirs", "{:,.0f}"),
        Column("x", "ratio", "{:.2f}"),
        Column("equal, %", "equal", "{:.0f}"),
    ),
    cases,
    measure,
)

"""The data sets by name: where each is found and how one of its rows becomes an example.

Prompts have Alpaca's form, as MetaMath (arXiv 2309.12284) and LLM-Adapters (arXiv 2304.01933) use it, without the trailing spaces that
some of their files have. The response follows after a line break, at training and at generation alike.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.core.answers import boxed, options, value
from fedsim.data.rows import Malformed
from fedsim.types import Example, Family

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """One named set. `train` and `test` are file patterns below a local folder; of several, the first that matches is taken."""

    name: str
    example: Callable[[Row, str], Example]
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    hub: str | None = None
    hub_config: str | None = None

    def patterns(self, split: str) -> tuple[str, ...]:
        """Returns the file patterns of "train" or "test"."""
        return self.train if split == "train" else self.test


def _field(row: Row, name: str) -> str:
    """Returns a text field. Raises Malformed where it is missing, no text, or blank."""
    if not isinstance(row, Mapping):
        raise Malformed(f"expected an object with fields, got {type(row).__name__}")
    if name not in row:
        raise Malformed(f"expected the field {name!r}, got {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise Malformed(f"expected text in {name!r}, got {row[name]!r:.40}")
    return str(row[name])


def _gsm8k(row: Row, name: str) -> Example:
    """Calculator annotations such as <<16-3-4=9>> are left out, as usual."""
    question, solution = _field(row, "question"), re.sub(r"<<[^>]*>>", "", _field(row, "answer"))
    steps, mark, answer = solution.rpartition("####")
    if not mark or value(answer) is None:
        raise Malformed("expected 'answer' to end with '#### <number>'")
    return _arithmetic(name, question, f"{steps.rstrip()}\n#### {answer.strip()}", answer.strip())


def _metamath(row: Row, name: str) -> Example:
    question, response = _field(row, "query"), _field(row, "response")
    _, mark, answer = response.rpartition("The answer is:")
    if not mark or not answer.strip():
        raise Malformed("expected 'response' to end with 'The answer is: <answer>'")
    return _arithmetic(name, question, response.strip(), answer.strip())


def _math(row: Row, name: str) -> Example:
    question, response = _field(row, "problem"), _field(row, "solution")
    answer = boxed(response)
    if answer is None or not answer.strip():
        raise Malformed("expected 'solution' with its answer in \\boxed{...}")
    return _arithmetic(name, question, response.strip(), answer.strip())


def _arithmetic(name: str, question: str, response: str, answer: str) -> Example:
    return Example(name, Family.arithmetic, ALPACA.format(instruction=question.strip()), response, answer)


def _commonsense(row: Row, name: str) -> Example:
    instruction, response, answer = (_field(row, field).strip() for field in ("instruction", "output", "answer"))
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise Malformed(f"expected text in 'input', got {extra!r:.40}")
    choices = options(instruction)
    if answer not in choices:
        raise Malformed(f"expected 'answer' to be one of the options {'/'.join(choices) or '(none named)'}, got {answer!r:.40}")
    template = ALPACA_INPUT if extra and extra.strip() else ALPACA
    prompt = template.format(instruction=instruction, input=(extra or "").strip())
    return Example(name, Family.commonsense, prompt, response, answer)


def _test_set(name: str, folder: str) -> DataSet:
    """One of the eight sets, in the folders of LLM-Adapters."""
    return DataSet(name, _commonsense, train=(f"{folder}/train.*",), test=(f"{folder}/test.*", f"{folder}_test.*"))


COMMONSENSE_FOLDERS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
"""The eight test sets of Commonsense170K and their folders in LLM-Adapters' `dataset/`."""

SETS: dict[str, DataSet] = {
    each.name: each
    for each in [
        DataSet(
            "gsm8k",
            _gsm8k,
            ("gsm8k_train.*", "train.*", "train-*.parquet"),
            ("gsm8k_test.*", "test.*", "test-*.parquet"),
            "openai/gsm8k",
            "main",
        ),
        DataSet("metamathqa", _metamath, ("MetaMathQA*.json*", "metamath*.json*", "train.*", "*.parquet"), (), "meta-math/MetaMathQA"),
        DataSet("math", _math, ("math_train.*", "train.*"), ("math_test.*", "MATH_test.*", "test.*"), "DigitalLearningGmbH/MATH-lighteval"),
        DataSet("commonsense170k", _commonsense, ("commonsense_170k.*", "*/train.*")),
        *(_test_set(name, folder) for name, folder in COMMONSENSE_FOLDERS.items()),
    ]
}
"""All sets that are read from files or a hub; the embedded one is made."""

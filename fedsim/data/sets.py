"""Defines the data sets by name: where each is found and how a row becomes an example.

Prompts have Alpaca's form, as in MetaMath (arXiv 2309.12284) and LLM-Adapters (arXiv 2304.01933), at both training and generation.
Without the spaces that LLM-Adapters' source puts before every line, and without MetaMath's "Let's think step by step.", which only its
test questions have. Sets for classification have no prompt (`fedsim.data.classified`).
`instructions` takes a user's own texts or conversations, in the columns of public instruction sets.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fedsim.config import DataConfig
from fedsim.core.answers import boxed, options, value
from fedsim.data.classified import INFERENCE, classification, sick, snli
from fedsim.data.columns import Row, column_of, text_of, unicode_text
from fedsim.data.hub import Address, Hub
from fedsim.data.rows import Malformed
from fedsim.errors import UserError
from fedsim.training.conversations import in_alpaca
from fedsim.types import AnyExample, Example, Family, Turn

ALPACA = in_alpaca([Turn("user", "{instruction}")])
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class DataSet:
    """One named set. `train` and `test` are file patterns below a local folder; the first that matches is used.

    `example` returns None for a row that the set itself excludes.
    """

    name: str
    example: Callable[[Row, str], AnyExample | None]
    train: tuple[str, ...]
    test: tuple[str, ...]
    remote: Hub | Address | None  # None for a set of the user's own
    labels: tuple[str, ...] | None = ()  # for classification, in the order of the head's outputs; None if its rows give them
    in_one: bool = False  # train and test are one file, locally and at `remote`
    split_column: str | None = None  # names the split of a row

    def patterns(self, split: str) -> tuple[str, ...]:
        """Returns the file patterns of "train" or "test"; empty if the set has no such split."""
        return self.train if split == "train" else self.test


def _gsm8k(row: Row, name: str) -> Example:
    """Reads a row without its calculator annotations such as <<16-3-4=9>>, as usual."""
    question, solution = text_of(row, "question"), re.sub(r"<<[^>]*>>", "", text_of(row, "answer"))
    steps, mark, answer = solution.rpartition("####")
    if not mark or value(answer) is None:
        raise Malformed("expected 'answer' to end with '#### <number>'")
    return _arithmetic(name, question, f"{steps.rstrip()}\n#### {answer.strip()}", answer.strip())


def _metamath(row: Row, name: str) -> Example:
    question, response = text_of(row, "query"), text_of(row, "response")
    _, mark, answer = response.rpartition("The answer is:")
    if not mark or not answer.strip():
        raise Malformed("expected 'response' to end with 'The answer is: <answer>'")
    return _arithmetic(name, question, response.strip(), answer.strip())


def _math(row: Row, name: str) -> Example:
    question, response = text_of(row, "problem"), text_of(row, "solution")
    answer = boxed(response)
    if answer is None or not answer.strip():
        raise Malformed("expected 'solution' with its answer in \\boxed{...}")
    return _arithmetic(name, question, response.strip(), answer.strip())


def _arithmetic(name: str, question: str, response: str, answer: str) -> Example:
    return Example(name, Family.arithmetic, ALPACA.format(instruction=question.strip()), response, answer)


def _commonsense(row: Row, name: str) -> Example:
    instruction, response, answer = (text_of(row, field).strip() for field in ("instruction", "output", "answer"))
    choices = options(instruction)
    if answer not in choices:
        raise Malformed(f"expected 'answer' to be one of the options {'/'.join(choices) or '(none named)'}, got {answer!r:.40}")
    prompt = _alpaca(instruction, row, "input") + "\n"  # in LLM-Adapters the answer starts on a new line
    return Example(name, Family.commonsense, prompt, response, answer)


def _alpaca(instruction: str, row: Row, *inputs: str) -> str:
    """Returns the prompt for an instruction, with the input in the first of the columns `inputs` that exists.

    Raises Malformed if the input is not text.
    """
    name = next((name for name in inputs if row.get(name) is not None), None)
    raw = "" if name is None else row[name]
    if not isinstance(raw, str):
        raise Malformed(f"expected text in {name!r}, got {raw!r:.40}")
    template = ALPACA_INPUT if raw.strip() else ALPACA
    return template.format(instruction=instruction, input=unicode_text(raw.strip(), str(name)))


ASKED, EXTRA, ANSWERED = ("instruction", "question", "query"), ("input", "context"), ("output", "response", "answer", "completion")
"""Columns of a user's own set, as in Alpaca, Dolly and others: instruction, input, answer. The first of each that exists counts."""

PROMPT, CONTINUED = "prompt", ("completion", "response", "output", "answer")
"""Columns of a prompt that is used verbatim, and of its continuation."""


CHATS = ("messages", "conversations", "conversation")
"""Columns of a conversation: turns with role and content, as in OpenAI's format, or from and value, as in ShareGPT's."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""The role of a turn, by its name in public sets."""


def _instructions(row: Row, name: str) -> Example:
    """Reads an instruction, with or without an input; a prompt used verbatim; or a conversation, whose last turn is the response."""
    if isinstance(row, Mapping) and (column := _chat_column(row)):
        return _chat(row, column, name)
    if column_of(row, *ASKED, PROMPT) == PROMPT:
        response = text_of(row, *CONTINUED)
        return Example(name, Family.text, text_of(row, PROMPT), response, response)
    instruction, response = text_of(row, *ASKED).strip(), text_of(row, *ANSWERED).strip()
    return Example(name, Family.text, _alpaca(instruction, row, *EXTRA), response, response)


def _chat_column(row: Row) -> str | None:
    """Returns the column of a conversation; one without turns counts only if the row has nothing else to read."""
    others = any(name in row for name in (*ASKED, PROMPT))
    return next((name for name in CHATS if name in row and (not others or (isinstance(row[name], list) and row[name]))), None)


def _chat(row: Row, column: str, name: str) -> Example:
    """Reads a conversation: its last turn is the response. Drops assistant turns before the first user turn."""
    raw = row[column]
    if not isinstance(raw, list):
        raise Malformed(f"expected a list of turns in {column!r}, got {raw!r:.40}")
    turns = [turn for each in raw if (turn := _turn(each, column))]
    if isinstance(row.get("system"), str) and row["system"].strip() and not any(turn.role == "system" for turn in turns):
        turns.insert(0, Turn("system", text_of(row, "system").strip()))
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns))
    turns = [turn for place, turn in enumerate(turns) if place >= first or turn.role == "system"]
    if not turns or turns[-1].role != "assistant":
        said = ", ".join(turn.role for turn in turns)
        raise Malformed(f"expected turns in {column!r} that end with an assistant's to a user, got {said[-60:] or 'none'}")
    *before, last = _merged(turns)
    return Example(name, Family.text, in_alpaca(before), last.content, last.content, turns=tuple(before))


def _turn(raw: Any, column: str) -> Turn | None:
    """Returns one turn; None for an empty system turn."""
    if not isinstance(raw, Mapping):
        raise Malformed(f"expected turns with role and content in {column!r}, got {raw!r:.40}")
    raw = {key: value for key, value in raw.items() if value is not None}  # in a table all rows have all columns
    given = text_of(raw, "role", "from")
    if (role := ROLES.get(given)) is None:
        raise Malformed(f"expected turns of system, user and assistant in {column!r}, got one of {given!r:.40}")
    content = raw.get("content")
    if isinstance(content, list):  # parts, all of which must be text
        raw = {"content": "".join(text_of(part, "text") for part in content)}
    if role == "system" and not str(raw.get("content", raw.get("value", ""))).strip():
        return None
    return Turn(role, text_of(raw, "content", "value").strip())


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the turns with consecutive turns of one role joined; many models expect alternating roles."""
    return [Turn(role, "\n\n".join(turn.content for turn in together)) for role, together in groupby(turns, key=lambda turn: turn.role)]


def _files(split: str, *names: str) -> tuple[str, ...]:
    """Returns patterns of a split: gsm8k_train.jsonl, gsm8k/train.csv, train.json, or the hub's Parquet, there or one folder below."""
    told = [f"{name}{link}{split}.*" for name in names for link in ("_", "-", "/")]
    return (*told, f"{split}.*", f"{split}-*.parquet", f"*/{split}-*.parquet")


def _math_files(split: str) -> tuple[str, ...]:
    """Returns the patterns above and those of the original MATH: a folder for each subject with a file for each problem."""
    return (*_files(split, "math", "MATH"), f"{split}/*/*.json", f"*/{split}/*/*.json")


COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa")
"""The eight test sets of Commonsense170K, named like their folders in LLM-Adapters."""

_LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"


def _one_of_eight(name: str) -> DataSet:
    train, test = ((f"{name}/{split}.*", f"{name}_{split}.*") for split in ("train", "test"))
    return DataSet(name, _commonsense, train, test, Address(f"{_LLM_ADAPTERS}/dataset/{name}/{{split}}.json"))


_SICK_FILES = ("SICK.*", "sick.*", "*/SICK.*")
_SICK = "https://raw.githubusercontent.com/praguna/sick_dataset/6dbe1aac3896a37a688d95a61ca46db88793b285/SICK.txt"


SETS: dict[str, DataSet] = {
    each.name: each
    for each in [
        DataSet("gsm8k", _gsm8k, _files("train", "gsm8k"), _files("test", "gsm8k"), Hub("openai/gsm8k", "main")),
        DataSet(
            "metamathqa",
            _metamath,
            ("MetaMathQA-395K.*", "MetaMathQA.*", "metamathqa.*", *_files("train", "metamathqa")),
            (),
            Hub("meta-math/MetaMathQA"),
        ),
        DataSet("math", _math, _math_files("train"), _math_files("test"), Hub("DigitalLearningGmbH/MATH-lighteval")),
        DataSet(
            "commonsense_170k",
            _commonsense,
            ("commonsense_170k.*", "*/train.*"),  # the whole set, or else those parts that exist
            (),
            Address(f"{_LLM_ADAPTERS}/ft-training_set/commonsense_170k.json"),
        ),
        *map(_one_of_eight, COMMONSENSE),
        DataSet("instructions", _instructions, _files("train", "instructions"), _files("test", "instructions"), None),
        DataSet("classification", classification, _files("train", "classification"), _files("test", "classification"), None, None),
        DataSet("snli", snli, _files("train", "snli"), _files("test", "snli"), Hub("stanfordnlp/snli"), INFERENCE),
        DataSet("sick", sick, _SICK_FILES, _SICK_FILES, Address(_SICK), INFERENCE, in_one=True, split_column="SemEval_set"),
    ]
}
"""All sets that are read from files, the hub or the web; the embedded set is generated."""


def labels(config: DataConfig) -> tuple[str, ...] | None:
    """Returns the labels of the configuration's sets, in the order of the head's outputs; empty if the sets are not for classification.

    None for the user's own labels, which the configuration or the training rows give (`Dataset.labels`). Raises UserError
    if the sets differ, or if the configuration names labels for a set with known labels.
    """
    found = {name: SETS[name].labels if name in SETS else () for name in (*config.train, *config.test)}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{name} ({_described(own)})" for name, own in found.items())
        raise UserError(f"data.train, data.test: expected sets that one model serves, got {kinds}. Choose sets of one kind.")
    name, own = next(iter(found.items()), ("", ()))
    if config.labels and own is not None:
        raise UserError(
            f"data.labels=[{','.join(config.labels)}]: the labels of {name} are known ({_described(own)}). "
            "Leave data.labels out, or choose data=classification."
        )
    return own


def _described(own: tuple[str, ...] | None) -> str:
    return "labels of your own" if own is None else "/".join(own) or "answered in words"

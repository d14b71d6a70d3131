"""Types shared by all layers of the code.

A client is a data owner. An adapter is a dictionary of factors; with a leading client axis it holds a whole cohort.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Adapter = dict[str, Tensor]
"""Tensors by factor name, such as "model.layers.0.self_attn.q_proj.R"; stacked: [clients, ...]."""


class Family(Enum):
    """Kinds of answers, which determine how an answer is extracted from generated text."""

    arithmetic = "a number, compared by value"
    commonsense = "one of the options that the prompt names, compared exactly"
    text = "a whole text, compared word by word"


class Turn(NamedTuple):
    """One message of a conversation, by the system, the user or the assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt with its reference response.

    `task` is the example's row in the results table ("gsm8k", "boolq"); `answer` is the gold answer ("18", "answer3", "true") to compare
    generated answers with. `client` is the owner that the data names. `turns` is the conversation up to the response, for models with a
    chat template; other models get `prompt`.
    """

    task: str
    family: Family
    prompt: str
    response: str
    answer: str
    client: str | None = None
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """One or two texts and their label, for a model that classifies.

    `labels` are all labels of the set, in the order of the classification head's outputs; `answer` is the gold label. `hypothesis` is None
    for a single text. `client` is the owner that the data names.
    """

    task: str
    premise: str
    hypothesis: str | None
    answer: str
    labels: tuple[str, ...]
    client: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The single text, or both."""
        return (self.premise,) if self.hypothesis is None else (self.premise, self.hypothesis)


AnyExample = Example | Labelled
"""An example of a client; all examples of a run are of one kind."""


Tokens = npt.NDArray[np.int32]
"""Token ids [tokens], read-only: 4 bytes each, where a tuple takes 40. Often a view of a larger array or of a file."""


class _Encoded:
    """Base class that compares all fields, arrays by their entries. Subclasses store any given sequences as `Tokens`."""

    input_ids: Tokens

    def __eq__(self, other: object) -> bool:
        same = type(self) is type(other)
        return same and all(np.array_equal(mine, vars(other)[name]) for name, mine in vars(self).items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence."""
        return len(self.input_ids)

    @property
    def width(self) -> int:
        """Positions, padding included, of a pass over this example alone."""
        return self.num_tokens


def _tokens(ids: npt.ArrayLike) -> Tokens:
    """Returns a read-only view of an array, or a read-only array of any other sequence."""
    tokens = np.asarray(ids, dtype=np.int32).view()
    tokens.flags.writeable = False
    return tokens


@dataclass(frozen=True, eq=False)
class EncodedExample(_Encoded):
    """Tokens of prompt and response (end-of-sequence included). The loss is on `input_ids[loss_start:]`."""

    input_ids: Tokens
    loss_start: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", _tokens(self.input_ids))


@dataclass(frozen=True, eq=False)
class EncodedLabelled(_Encoded):
    """Tokens of a `Labelled` in the encoder's format, the text that each belongs to (empty if the model does not take it), and the label.

    `split` is the start of the second text if it is read on its own; 0 for a single sequence.
    """

    input_ids: Tokens
    segments: Tokens
    label: int
    split: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", _tokens(self.input_ids))
        object.__setattr__(self, "segments", _tokens(self.segments))

    @property
    def width(self) -> int:
        """Positions of a pass over this example alone; texts read apart are two rows as long as the longer one."""
        return 2 * max(self.split, self.num_tokens - self.split) if self.split else self.num_tokens


AnyEncoded = EncodedExample | EncodedLabelled
"""An encoded example, as models are trained on it."""

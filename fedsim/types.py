"""The nouns that all layers share.

A client is a data owner. An adapter is a dictionary of factors; with a leading client axis it holds a whole cohort.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

Adapter = dict[str, Tensor]
"""Factor name, such as "model.layers.0.self_attn.q_proj.R", to its tensor; stacked: [clients, ...]."""


class Family(Enum):
    """What an answer is, which decides how it is read from a generated text."""

    arithmetic = "a number, compared by value"
    commonsense = "one of the options that the prompt names, compared exactly"
    text = "a whole text, compared word by word"


class Turn(NamedTuple):
    """What one side of a conversation says: the system, the user or the assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt with its reference response.

    `task` is the row of the results table that the example belongs to ("gsm8k", "boolq"); `answer` is the gold answer
    ("18", "answer3", "true") that an answer read from a generated text is compared with. `client` is the owner that the data names.
    `turns` is a conversation up to the response, for models that have a form of their own for it; `prompt` is what others are given.
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
    """Two texts, or one, and which of `labels` tells what they are: for a model that classifies and generates nothing.

    `labels` are all of the set's, in the order of the classification head's outputs; `answer` is the gold one. `hypothesis` is None where
    there is one text only. `client` is the owner that the data names.
    """

    task: str
    premise: str
    hypothesis: str | None
    answer: str
    labels: tuple[str, ...]
    client: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The one text, or both."""
        return (self.premise,) if self.hypothesis is None else (self.premise, self.hypothesis)


AnyExample = Example | Labelled
"""What a client owns; a run has one kind only."""


Tokens = npt.NDArray[np.int32]
"""Token ids [tokens], read-only: 4 bytes each, where a tuple of numbers takes 40. Often a view of a larger array, or of a file."""


class _Encoded:
    """What is equal where all fields are, arrays by their entries. Whatever sequences it is made of are kept as `Tokens`."""

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
        """Positions that a pass of this example alone has, padding included."""
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
    """Tokens of a `Labelled` as the encoder reads it, which text each belongs to (empty for a model that is not told), and the label.

    `split` is where the second text begins that is read on its own; 0 where all is one sequence.
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
        """Two texts that are read apart are two rows as long as the longer one."""
        return 2 * max(self.split, self.num_tokens - self.split) if self.split else self.num_tokens


AnyEncoded = EncodedExample | EncodedLabelled
"""What a model is trained on."""

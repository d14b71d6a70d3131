"""Rows that are classified: two texts of language inference, or whatever texts and labels a user has.

SNLI (arXiv 1508.05326) and SICK (Marelli et al., LREC 2014) have labels that are known. The columns and labels of a user's own set are
those of its rows; the columns are called as in public sets (GLUE, IMDB, AG News, banking77).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsim.data.columns import Row, column_of, columns, named, text_of
from fedsim.data.rows import Malformed, NoColumn
from fedsim.errors import UserError
from fedsim.types import Labelled

INFERENCE = ("entailment", "neutral", "contradiction")
"""Labels of natural language inference, in the order in which SNLI's hub data set numbers them."""


def _label(row: Row, *names: str) -> str | None:
    """Returns the label in the first of the columns that is there, by name or number; None for what SNLI marks as without a label."""
    column = column_of(row, *names)
    told = str(row[column]).strip().lower()
    if told in ("-1", "-"):
        return None
    known = dict(zip((*INFERENCE, "0", "1", "2"), 2 * INFERENCE, strict=True))
    if told not in known:
        raise Malformed(f"expected {column!r} to be one of {', '.join(INFERENCE)} or 0, 1, 2, got {row[column]!r:.40}")
    return known[told]


def _pair(row: Row, name: str, premise: str, hypothesis: str, label: str | None) -> Labelled | None:
    return label and Labelled(name, text_of(row, premise).strip(), text_of(row, hypothesis).strip(), label, INFERENCE)  # type: ignore[return-value]


def snli(row: Row, name: str) -> Labelled | None:
    """A row of the hub, or of the original files. A pair on which its annotators did not agree has no label and is left out."""
    label = _label(row, "label", "gold_label")
    return _pair(row, name, *(("premise", "hypothesis") if "premise" in row else ("sentence1", "sentence2")), label)


def sick(row: Row, name: str) -> Labelled | None:
    return _pair(row, name, "sentence_A", "sentence_B", _label(row, "entailment_judgment", "entailment_label", "label"))


TEXT = ("text", "sentence", "content", "review", "question", "title")
"""Columns of a single text. The first that is there counts."""

TEXTS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
"""Columns of two texts. The first of which both are there count, before those of a single one."""

LABEL = ("label", "labels", "class", "category", "sentiment", "topic", "intent")
"""Columns of the label. The first that is there counts."""

MOST_LABELS = 1000
"""More are names of something else, such as the numbers of the rows; each is a row of the head."""


def classification(row: Row, name: str) -> Labelled:
    """A text, or two, and the name or whole number of a label; which labels there are is known once all rows are."""
    answer = named(row, column_of(row, *LABEL))
    both = next((pair for pair in TEXTS if all(column in row for column in pair)), None)
    if both is None and not any(column in row for column in TEXT):
        pairs = ", ".join(" and ".join(map(repr, pair)) for pair in TEXTS)
        raise NoColumn(f"expected a text in {', '.join(map(repr, TEXT))}, or two in {pairs}; got {columns(row)}")
    texts = [text_of(row, column).strip() for column in both] if both else [text_of(row, *TEXT).strip()]
    return Labelled(name, texts[0], texts[1] if both else None, answer, ())


@dataclass
class Form:
    """What the rows of a user's own set have in common: the labels, and how many texts each has.

    Labels are those that the configuration names, or else, once they are settled, those of the training rows.
    """

    labels: tuple[str, ...]
    texts: int = 0  # not known before the first row
    _found: set[str] = field(default_factory=set, init=False)

    def take(self, example: Labelled) -> None:
        """Adds a row. Raises Malformed if it does not fit the others."""
        texts = len(example.texts)
        if self.texts not in (0, texts):
            raise Malformed(f"expected {_counted(self.texts)} as in the rows before, got {_counted(texts)}")
        if self.labels and example.answer not in self.labels:
            raise Malformed(f"expected a label out of {_some(self.labels)}, got {example.answer!r:.40}")
        self.texts = texts
        self._found.add(example.answer)

    def settled(self) -> tuple[str, ...]:
        """Returns the labels, from now on those of the rows so far: numbers by size, others by letter.

        Raises UserError where there are too few or too many.
        """
        if self.labels:
            return self.labels
        if not 2 <= len(self._found) <= MOST_LABELS:
            raise UserError(
                f"data.path: expected 2 to {MOST_LABELS:,} labels in the training rows, got {len(self._found):,}: "
                f"{_some(sorted(self._found))}. Give rows of several labels, or name the labels: data.labels=[...]."
            )
        numbers = all(re.fullmatch("-?[0-9]{1,18}", label) for label in self._found)
        self.labels = tuple(sorted(self._found, key=lambda label: (int(label) if numbers else 0, label)))
        return self.labels


def _counted(texts: int) -> str:
    return "one text" if texts == 1 else "two texts"


def _some(labels: Sequence[str]) -> str:
    return ", ".join(f"{label:.40}" for label in labels[:20]) + (f" and {len(labels) - 20:,} more" if len(labels) > 20 else "")

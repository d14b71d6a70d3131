"""Reads rows for classification: pairs of language inference, or a user's own texts and labels.

SNLI (arXiv 1508.05326) and SICK (Marelli et al., LREC 2014) have known labels. A user's own set takes its labels from its rows, and
its columns are named as in public sets (GLUE, IMDB, AG News, banking77).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsim.data.columns import Row, column_of, columns, named, text_of
from fedsim.data.rows import Malformed, NoColumn
from fedsim.errors import UserError
from fedsim.types import Labelled

INFERENCE = ("entailment", "neutral", "contradiction")
"""Labels of natural language inference, in the order of SNLI's numbers on the hub."""


def _label(row: Row, *names: str) -> str | None:
    """Returns the label, given by name or number, in the first column of `names` that exists; None for SNLI's marks of no label."""
    column = column_of(row, *names)
    label_text = str(row[column]).strip().lower()
    if label_text in ("-1", "-"):
        return None
    known = dict(zip((*INFERENCE, "0", "1", "2"), 2 * INFERENCE, strict=True))
    if label_text not in known:
        raise Malformed(f"expected {column!r} to be one of {', '.join(INFERENCE)} or 0, 1, 2, got {row[column]!r:.40}")
    return known[label_text]


def _pair(row: Row, name: str, premise: str, hypothesis: str, label: str | None) -> Labelled | None:
    return label and Labelled(name, text_of(row, premise).strip(), text_of(row, hypothesis).strip(), label, INFERENCE)  # type: ignore[return-value]


def snli(row: Row, name: str) -> Labelled | None:
    """Reads a row of the hub or of the original files. A pair whose annotators disagreed has no label and is left out."""
    label = _label(row, "label", "gold_label")
    return _pair(row, name, *(("premise", "hypothesis") if "premise" in row else ("sentence1", "sentence2")), label)


def sick(row: Row, name: str) -> Labelled | None:
    return _pair(row, name, "sentence_A", "sentence_B", _label(row, "entailment_judgment", "entailment_label", "label"))


TEXT = ("text", "sentence", "content", "review", "question", "title")
"""Columns of a single text. The first that exists counts."""

TEXTS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
"""Columns of two texts. The first pair that exists counts, and takes precedence over a single text."""

LABEL = ("label", "labels", "class", "category", "sentiment", "topic", "intent")
"""Columns of the label. The first that exists counts."""

MOST_LABELS = 1000
"""More labels mean that the column holds something else, such as row numbers; each label is a row of the head."""


def classification(row: Row, name: str) -> Labelled:
    """Reads one or two texts and a label: a name, a whole number, or a Boolean, which becomes "True" or "False"."""
    column = column_of(row, *LABEL)
    answer = str(row[column]) if isinstance(row[column], bool) else named(row, column)
    both = next((pair for pair in TEXTS if all(column in row for column in pair)), None)
    if both is None and not any(column in row for column in TEXT):
        pairs = ", ".join(" and ".join(map(repr, pair)) for pair in TEXTS)
        raise NoColumn(f"expected a text in {', '.join(map(repr, TEXT))}, or two in {pairs}; got {columns(row)}")
    texts = [text_of(row, column).strip() for column in both] if both else [text_of(row, *TEXT).strip()]
    return Labelled(name, texts[0], texts[1] if both else None, answer, ())


@dataclass
class Form:
    """What all rows of a user's own set share: the labels, and the number of texts.

    Labels are those in the configuration, or else those of the training rows, once `fix_labels` was called.
    """

    labels: tuple[str, ...]
    texts: int = 0  # 0 before the first row
    _found: set[str] = field(default_factory=set, init=False)

    def take(self, example: Labelled) -> None:
        """Adds a row. Raises Malformed if it does not match the others."""
        texts = len(example.texts)
        if self.texts not in (0, texts):
            raise Malformed(f"expected {_counted(self.texts)} as in the rows before, got {_counted(texts)}")
        if self.labels and example.answer not in self.labels:
            raise Malformed(f"expected a label out of {_shortened(self.labels)}, got {example.answer!r:.40}")
        self.texts = texts
        self._found.add(example.answer)

    def fix_labels(self) -> tuple[str, ...]:
        """Returns the labels and fixes them to those read so far: numbers in numeric order, names in alphabetical order.

        Raises UserError if there are too few or too many.
        """
        if self.labels:
            return self.labels
        if not 2 <= len(self._found) <= MOST_LABELS:
            raise UserError(
                f"data.path: expected 2 to {MOST_LABELS:,} labels in the training rows, got {len(self._found):,}: "
                f"{_shortened(sorted(self._found))}. Give rows of several labels, or name the labels: data.labels=[...]."
            )
        numbers = all(re.fullmatch("-?[0-9]{1,18}", label) for label in self._found)
        self.labels = tuple(sorted(self._found, key=lambda label: (int(label) if numbers else 0, label)))
        return self.labels


def _counted(texts: int) -> str:
    return "one text" if texts == 1 else "two texts"


def _shortened(labels: Sequence[str]) -> str:
    return ", ".join(f"{label:.40}" for label in labels[:20]) + (f" and {len(labels) - 20:,} more" if len(labels) > 20 else "")

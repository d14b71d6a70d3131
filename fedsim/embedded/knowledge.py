"""The knowledge base as relations: what is true of a subject, and what is false of it and may serve as a wrong option."""

from dataclasses import dataclass
from itertools import pairwise

from fedsim.embedded import facts
from fedsim.embedded.facts import ALIKE_FEELINGS, ALSO_TRUE, ANIMALS, EVENTS, FEELINGS, NATURE, NEEDS, OPPOSITES, ORDERED, THINGS, WORKERS


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `facts` maps a subject to its one true value; the other values are false for it, except `exceptions`."""

    name: str
    facts: dict[str, str]
    exceptions: frozenset[tuple[str, str]] = frozenset()

    def false_values(self, subject: str) -> list[str]:
        """Returns the values of the relation that are not true for `subject`, each once, in order of first mention."""
        true = self.facts[subject]
        values = dict.fromkeys(self.facts.values())
        return [value for value in values if value != true and (subject, value) not in self.exceptions]

    def false_subjects(self, value: str) -> list[str]:
        """Returns the subjects for which `value` is not true."""
        return [subject for subject, true in self.facts.items() if true != value and (subject, value) not in self.exceptions]


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def _column(table: str, column: int) -> dict[str, str]:
    return {row[0]: row[column] for row in _rows(table)}


def _opposites() -> dict[str, str]:
    pairs = [pair.split("/") for pair in OPPOSITES.split()]
    return dict(pairs) | {b: a for a, b in pairs}


def _next() -> dict[str, str]:
    orders = [order.split() for order in ORDERED.values()]
    return {first: second for order in orders for first, second in pairwise(order)}


def _also_true(name: str) -> frozenset[tuple[str, str]]:
    words = [pair.replace("_", " ").split(":") for pair in ALSO_TRUE.get(name, "").split()]
    return frozenset((subject, value) for subject, value in words)


def _places(places: dict[str, str]) -> frozenset[tuple[str, str]]:
    """Returns (thing, place) pairs that may hold: things of one kind share places, and small things may lie anywhere in a house."""
    everywhere = {"drawer", "closet", "cupboard", "kitchen", "pocket", "basket", "wall", "hall", "desk", "bathroom", "office", "garage"}
    pairs = {(a, places[b]) for a in places for b in places if _KINDS[a] == _KINDS[b]}
    small = {"tool", "dish", "supply", "clothing", "toy", "machine", "furniture"}
    return frozenset(pairs | {(a, place) for a in places for place in everywhere if _KINDS[a] in small})


def _alike_feelings(feelings: dict[str, str]) -> frozenset[tuple[str, str]]:
    lines = [set(line.split()) for line in ALIKE_FEELINGS.splitlines()]
    return frozenset((event, other) for event, feeling in feelings.items() for line in lines if feeling in line for other in line)


_KINDS = {name: row[1] for table in (THINGS, ANIMALS, NATURE) for row in _rows(table) for name in [row[0]]}

_PLACES = _column(THINGS, 4)
_FEELS = _column(FEELINGS, 1)

RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        Relation("kind", _KINDS, _also_true("kind")),
        Relation("use", _column(THINGS, 2)),
        Relation("material", _column(THINGS, 3), _also_true("material")),
        Relation("place", _PLACES, _places(_PLACES)),
        Relation("ability", _column(ANIMALS, 2), _also_true("ability")),
        Relation("young", _column(ANIMALS, 3), _also_true("young")),
        Relation("home", _column(ANIMALS, 4), _also_true("home")),
        Relation("food", _column(ANIMALS, 5), _also_true("food")),
        Relation("color", _column(NATURE, 2), _also_true("color")),
        Relation("source", _column(NATURE, 3), _also_true("source")),
        Relation("job", _column(WORKERS, 1)),
        Relation("workplace", _column(WORKERS, 2)),
        Relation("opposite", _opposites()),
        Relation("next", _next()),
        Relation("feeling", _FEELS, _alike_feelings(_FEELS)),
        Relation("reaction", _column(FEELINGS, 2)),
        Relation("effect", _column(EVENTS, 1)),
        Relation("need", _column(NEEDS, 1), _also_true("need")),
    )
}
"""Every relation by name."""

SIZES = facts.SIZES.split()
"""From the smallest to the largest."""

SAME_KIND_ORDER = {word: kind for kind, words in ORDERED.items() for word in words.split()}
"""The order ("day", "month", ...) of each word of the relation `next`."""


def article(noun: str) -> str:
    """Returns the noun with "a" or "an"; pairs and substances have no article, and the sun has "the"."""
    if noun in {"scissors", "snow", "grass", "chocolate", "coal", "milk", "coffee", "butter", "salt", "spinach", "glue", "soap"}:
        return noun
    if noun == "sun":
        return "the sun"
    return f"an {noun}" if noun[0] in "aeiou" and noun != "use" else f"a {noun}"

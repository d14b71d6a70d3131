"""Generates arithmetic word problems of one to three steps with worked solutions, in the answer form of GSM8K (`#### n`).

A problem has sentences with numbers, a question and the steps that answer it. The same sentences serve several
questions, the same verb moves things to or from the person asked about, and some numbers are distractors, so neither
a keyword nor the order of the numbers decides the answer.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedsim.embedded.commonsense import NAMES, pick, sample
from fedsim.embedded.splits import draw_unique, split_of
from fedsim.seeding import numpy_generator
from fedsim.types import Example, Family

_OBJECTS = "apples coins books stamps cards shells pens eggs cakes toys marbles stickers plums stones buttons ribbons"
OBJECTS = _OBJECTS.split()
HOLDERS = ["boxes", "bags", "baskets", "jars", "crates", "trays"]
LIMIT = 99
"""Largest number in any problem."""

_OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.floordiv}

Step = tuple[int, str, int]
"""Left operand, sign, right operand."""


@dataclass(frozen=True)
class Problem:
    """A word problem: its kind, its sentences, its question, and the steps from the numbers to the answer."""

    kind: str
    sentences: tuple[str, ...]
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return result(self.steps[-1])

    @property
    def text(self) -> str:
        return " ".join((*self.sentences, self.question))

    @property
    def key(self) -> str:
        """Returns the problem's identity for the split: its kind and steps, whatever the names and objects."""
        return f"{self.kind}/{self.steps}"


def result(step: Step) -> int:
    """Returns the value of one step; divisions are exact."""
    left, sign, right = step
    return _OPERATIONS[sign](left, right)


def _int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _extra(rng: np.random.Generator, sentences: list[str], name: str, thing: str) -> list[str]:
    """Inserts, in two of five problems, a sentence with a distractor number somewhere after the first sentence."""
    if rng.random() > 0.4:
        return sentences
    number = _int(rng, 2, 60)
    other = pick(rng, [n for n in NAMES if n != name])
    other_thing = pick(rng, [o for o in OBJECTS if o != thing])
    sentence = f"{name} also has {number} {other_thing} ." if rng.random() < 0.5 else f"The friend {other} has {number} {other_thing} ."
    at = _int(rng, 1, len(sentences))
    return [*sentences[:at], sentence, *sentences[at:]]


_GAIN = ["{n} buys {k} more .", "{n} finds {k} more .", "{o} gives {k} to {n} .", "{n} gets {k} from {o} ."]
_LOSE = ["{n} loses {k} of them .", "{n} gives {k} to {o} .", "{n} sells {k} of them .", "{o} gets {k} from {n} ."]


def _changes(rng: np.random.Generator) -> Problem:
    """Makes one to three consecutive gains or losses; asks for the final number."""
    name, other = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    total = _int(rng, 5, 60)
    sentences, steps = [f"{name} has {total} {thing} ."], []
    for _ in range(_int(rng, 1, 3)):
        gain = (bool(rng.integers(2)) and total < 90) or total < 4
        change = _int(rng, 2, min(30, LIMIT - total)) if gain else _int(rng, 2, min(30, total - 1))
        sentences.append(pick(rng, _GAIN if gain else _LOSE).format(n=name, o=other, k=change))
        steps.append((total, "+" if gain else "-", change))
        total = result(steps[-1])
    question = f"How many {thing} does {name} have now ?"
    return Problem("changes", tuple(_extra(rng, sentences, name, thing)), question, tuple(steps))


def _moves(rng: np.random.Generator) -> Problem:
    """Makes one person give to another; asks about either of them."""
    giver, taker = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    has, had, moved = _int(rng, 10, 60), _int(rng, 2, 40), _int(rng, 2, 9)
    first = [f"{giver} has {has} {thing} .", f"{taker} has {had} {thing} ."]
    sentences = [*sample(rng, first, 2), f"{giver} gives {moved} to {taker} ."]
    asks_giver = bool(rng.integers(2))
    steps = ((has, "-", moved),) if asks_giver else ((had, "+", moved),)
    return Problem("moves", tuple(sentences), f"How many {thing} does {giver if asks_giver else taker} have now ?", steps)


def _compare(rng: np.random.Generator) -> Problem:
    """Compares two people (more, fewer or times as many); asks for the second, for both together, or after a change."""
    name, other = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    relation = pick(rng, ["more", "fewer", "times"])
    has, gap = _int(rng, 14, 40), _int(rng, 2, 11)
    if relation == "times":
        has, gap = _int(rng, 2, 9), _int(rng, 2, 5)
    link = f"{gap} times as many {thing} as" if relation == "times" else f"{gap} {relation} {thing} than"
    sentences = [f"{name} has {has} {thing} .", f"{other} has {link} {name} ."]
    steps: list[Step] = [(has, {"more": "+", "fewer": "-", "times": "x"}[relation], gap)]
    ask = pick(rng, ["other", "both", "after"])
    if ask == "both":
        steps.append((has, "+", result(steps[0])))
        return Problem(f"compare {ask}", tuple(sentences), f"How many {thing} do {name} and {other} have together ?", tuple(steps))
    if ask == "after":
        change = _int(rng, 1, result(steps[0]) - 1)
        sentences.append(f"{other} sells {change} of them .")
        steps.append((result(steps[0]), "-", change))
    question = f"How many {thing} does {other} have{' now' if ask == 'after' else ''} ?"
    return Problem(f"compare {ask}", tuple(_extra(rng, sentences, name, thing)), question, tuple(steps))


def _gap(rng: np.random.Generator) -> Problem:
    """Gives two people things; asks for the difference or the sum."""
    name, other = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    low, high = sorted((_int(rng, 2, 45), _int(rng, 46, 54) if rng.random() < 0.3 else _int(rng, 2, 45)))
    high += low == high
    sentences = sample(rng, [f"{name} has {high} {thing} .", f"{other} has {low} {thing} ."], 2)
    if rng.random() < 0.5:
        question, steps = f"How many more {thing} does {name} have than {other} ?", ((high, "-", low),)
    else:
        question, steps = f"How many {thing} do {name} and {other} have together ?", ((high, "+", low),)
    return Problem("gap", tuple(_extra(rng, sentences, name, thing)), question, steps)


def _groups(rng: np.random.Generator) -> Problem:
    """Makes equal groups; asks for the total, or for the number after a change."""
    name, other = sample(rng, NAMES, 2)
    thing, holder = pick(rng, OBJECTS), pick(rng, HOLDERS)
    groups, each = _int(rng, 2, 9), _int(rng, 2, 9)
    sentences = [f"{name} has {groups} {holder} with {each} {thing} in each ."]
    steps: list[Step] = [(groups, "x", each)]
    ask = pick(rng, ["all", "gain", "lose"])
    if ask != "all":
        change = _int(rng, 2, 15) if ask == "gain" else _int(rng, 1, groups * each - 1)
        sentences.append(pick(rng, _GAIN if ask == "gain" else _LOSE).format(n=name, o=other, k=change))
        steps.append((groups * each, "+" if ask == "gain" else "-", change))
    question = f"How many {thing} does {name} have {'in all' if ask == 'all' else 'now'} ?"
    return Problem(f"groups {ask}", tuple(_extra(rng, sentences, name, thing)), question, tuple(steps))


def _share(rng: np.random.Generator) -> Problem:
    """Makes equal shares; asks for one share, for the number of holders, or for one share plus what its owner had before."""
    name, other = sample(rng, NAMES, 2)
    thing, holder = pick(rng, OBJECTS), pick(rng, HOLDERS)
    parts, each = _int(rng, 2, 9), _int(rng, 2, 9)
    start, steps = f"{name} has {parts * each} {thing} .", [(parts * each, "/", parts)]
    ask = pick(rng, ["share", "holders", "after"])
    if ask == "holders":
        sentences = [start, f"{name} puts {each} {thing} in each of the {holder} ."]
        return Problem(ask, tuple(sentences), f"How many {holder} does {name} fill ?", ((parts * each, "/", each),))
    sentences = [start, f"{name} shares them equally among {parts} friends ."]
    if ask == "share":
        return Problem(ask, tuple(_extra(rng, sentences, name, thing)), f"How many {thing} does each friend get ?", tuple(steps))
    before = _int(rng, 2, 20)
    sentences.append(f"The friend {other} had {before} {thing} before .")
    steps.append((each, "+", before))
    return Problem("share after", tuple(sentences), f"How many {thing} does {other} have now ?", tuple(steps))


def _shop(rng: np.random.Generator) -> Problem:
    """Prices things; asks for the cost or for the money left."""
    name = pick(rng, NAMES)
    thing = pick(rng, [o for o in OBJECTS if o != "coins"])
    count, price = _int(rng, 2, 9), _int(rng, 2, 9)
    sentences = [f"{name} buys {count} {thing} for {price} coins each ."]
    steps: list[Step] = [(count, "x", price)]
    if rng.random() < 0.4:
        return Problem("cost", tuple(_extra(rng, sentences, name, "coins")), f"How many coins does {name} pay ?", tuple(steps))
    money = _int(rng, count * price + 1, LIMIT)
    sentences.insert(_int(rng, 0, 1), f"{name} came with {money} coins .")
    steps.append((money, "-", count * price))
    return Problem("money left", tuple(sentences), f"How many coins does {name} have left ?", tuple(steps))


def _unknown(rng: np.random.Generator) -> Problem:
    """Gives the final number; asks for the change or for the initial number."""
    name, other = sample(rng, NAMES, 2)
    thing = pick(rng, OBJECTS)
    low, change = _int(rng, 5, 50), _int(rng, 2, 40)
    if rng.random() < 0.5:
        sentences = [f"{name} had {low} {thing} .", f"{other} gave some {thing} to {name} .", f"Now {name} has {low + change} {thing} ."]
        return Problem("change", tuple(sentences), f"How many {thing} did {other} give ?", ((low + change, "-", low),))
    sentences = [f"{name} had some {thing} .", f"{name} gave {change} to {other} .", f"Now {name} has {low} {thing} ."]
    return Problem("before", tuple(sentences), f"How many {thing} did {name} have before ?", ((low, "+", change),))


_KINDS: list[Callable[[np.random.Generator], Problem]] = [_changes, _changes, _moves, _compare, _gap, _groups, _share, _shop, _unknown]


def make_problem(rng: np.random.Generator) -> Problem:
    """Returns a random problem of any split whose numbers are all between 0 and LIMIT."""
    while True:
        problem = _KINDS[int(rng.integers(len(_KINDS)))](rng)
        if all(0 < result(step) <= LIMIT for step in problem.steps):
            return problem


def solution(problem: Problem) -> str:
    """Returns the worked steps, one per line, and the answer on the last line."""
    words = ["First", "Then", "Then"]
    lines = [f"{word} {a} {sign} {b} = {result((a, sign, b))} ." for word, (a, sign, b) in zip(words, problem.steps, strict=False)]
    return "\n".join([*lines, f"#### {problem.answer}"])


def draw(split: str, count: int, seed: int) -> list[Example]:
    """Returns up to `count` different examples of the split."""

    def make(rng: np.random.Generator) -> tuple[str, Example] | None:
        problem = make_problem(rng)
        if split_of(problem.key) != split:
            return None
        prompt = f"Problem: {problem.text}\n\nWorked solution:\n"
        return prompt, Example("arithmetic", Family.arithmetic, prompt, solution(problem), str(problem.answer))

    return draw_unique(make, count, numpy_generator(seed, "embedded", "arithmetic", split))

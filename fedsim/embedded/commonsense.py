"""Generates multiple-choice questions over the knowledge base, in the prompt forms of the eight commonsense sets.

A question is about one fact (relation, subject), and a hash of the fact decides its split: training never asks for the fact of a test
question. Wrong options come from the same column of the knowledge base as the right one. A response restates the question
with its answer, like a worked solution, and then names the option, in the words of the eight sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedsim.embedded.knowledge import RELATIONS, SAME_KIND_ORDER, SIZES, article
from fedsim.embedded.splits import draw_unique, split_of
from fedsim.seeding import numpy_generator
from fedsim.types import Example, Family

T = TypeVar("T")

NAMES = ["Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Max", "Lea", "Leo", "Ida", "Jim", "Amy", "Dan", "Zoe", "Kim", "Roy"]


@dataclass(frozen=True)
class Question:
    """A plain question about one fact, before it takes a prompt form. `reason` restates it with its answer."""

    fact: str
    form: str
    stem: str
    gold: str
    wrong: tuple[str, ...]
    reason: str


def pick(rng: np.random.Generator, values: list[T]) -> T:
    return values[int(rng.integers(len(values)))]


def sample(rng: np.random.Generator, values: list[T], count: int) -> list[T]:
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _weighted(rng: np.random.Generator, name: str, options: list[str], count: int) -> list[str]:
    """Draws different options, weighted by how often each is a right answer in its column, so that frequency gives no hint."""
    values = list(RELATIONS[name].facts.values()) if name in RELATIONS else []
    weights = np.array([max(1, values.count(option)) for option in options], dtype=float)
    chosen = rng.choice(len(options), size=min(count, len(options)), replace=False, p=weights / weights.sum())
    return [options[int(i)] for i in chosen]


VALUE_STEMS: dict[str, list[tuple[str, str]]] = {
    "kind": [("arc_easy", "what kind of thing is {a} ?"), ("openbookqa", "{a} is a kind of")],
    "use": [("arc_easy", "what do people do with {a} ?"), ("openbookqa", "people use {a} to"), ("piqa", "what is {a} good for ?")],
    "material": [("arc_easy", "what is {a} made of ?"), ("openbookqa", "{a} is made of")],
    "place": [("arc_challenge", "where do you find {a} ?"), ("openbookqa", "{a} is found in the")],
    "ability": [("arc_easy", "what can {a} do ?"), ("openbookqa", "{a} is able to")],
    "young": [("arc_easy", "what is the young of {a} called ?"), ("arc_challenge", "the young of {a} is called")],
    "home": [("arc_easy", "where does {a} live ?"), ("openbookqa", "{a} lives in the")],
    "food": [("arc_challenge", "what does {a} eat ?"), ("openbookqa", "{a} likes to eat")],
    "color": [("arc_easy", "what color is {a} ?"), ("openbookqa", "the color of {a} is")],
    "source": [("arc_easy", "where does {a} come from ?"), ("openbookqa", "{a} comes from the")],
    "job": [("arc_easy", "what does {a} do ?"), ("openbookqa", "the job of {a} is to")],
    "workplace": [("arc_easy", "where does {a} work ?"), ("openbookqa", "{a} works in the")],
    "opposite": [("arc_easy", "what is the opposite of {s} ?"), ("arc_challenge", "the opposite of {s} is")],
    "next": [("arc_easy", "what comes after {s} ?"), ("arc_challenge", "right after {s} comes")],
    "feeling": [("social_i_qa", "{name} {s} . how does {name} feel ?")],
    "reaction": [("social_i_qa", "{name} {s} . what does {name} want to do now ?")],
    "effect": [("hellaswag", "{name} {s} . then"), ("arc_challenge", "{name} {s} . what happened then ?")],
}
"""Forms and stems that ask for the value of a subject; {s} is the subject, {a} the subject with its article."""

SUBJECT_STEMS: dict[str, list[tuple[str, str]]] = {
    "kind": [("arc_easy", "which of these is a kind of {v} ?")],
    "use": [("piqa", "what do you need to {v} ?"), ("arc_challenge", "which thing helps you {v} ?")],
    "ability": [("arc_challenge", "which animal can {v} ?")],
    "young": [("arc_challenge", "which animal has a young called {v} ?")],
    "job": [("arc_easy", "who has to {v} ?"), ("arc_challenge", "whose job is to {v} ?")],
    "color": [("arc_challenge", "which of these is {v} ?")],
}
"""Forms and stems that ask for a subject with the value {v}."""

NUM_OPTIONS = {"arc_easy": 4, "arc_challenge": 4, "openbookqa": 4, "hellaswag": 4, "social_i_qa": 3, "piqa": 2, "winogrande": 2, "boolq": 2}
"""Number of options that a question of each form shows."""


def _ask_value(rng: np.random.Generator) -> Question:
    name = pick(rng, list(VALUE_STEMS))
    subject = pick(rng, list(RELATIONS[name].facts))
    form, stem = VALUE_STEMS[name][int(rng.integers(len(VALUE_STEMS[name])))]
    wrong = RELATIONS[name].false_values(subject)
    if name == "next":
        order = SAME_KIND_ORDER[subject]
        wrong = [word for word, other in SAME_KIND_ORDER.items() if other == order and word != RELATIONS[name].facts[subject]]
    stem = stem.format(s=subject, a=article(subject), name=pick(rng, NAMES))
    gold = RELATIONS[name].facts[subject]
    return Question(f"{name}/{subject}", form, stem, gold, tuple(wrong), f"{stem} {gold}")


def _ask_subject(rng: np.random.Generator) -> Question:
    name = pick(rng, list(SUBJECT_STEMS))
    subject = pick(rng, list(RELATIONS[name].facts))
    form, stem = SUBJECT_STEMS[name][int(rng.integers(len(SUBJECT_STEMS[name])))]
    value = RELATIONS[name].facts[subject]
    wrong = [article(other) for other in RELATIONS[name].false_subjects(value)]
    stem = stem.format(v=value)
    return Question(f"{name}/{subject}", form, stem, article(subject), tuple(wrong), f"{stem} {article(subject)}")


_CLAIMS = {
    "kind": "is {a} a kind of {v}",
    "use": "do people use {a} to {v}",
    "material": "is {a} made of {v}",
    "ability": "is {a} able to {v}",
    "young": "is the young of {a} called {v}",
    "home": "does {a} live in the {v}",
    "food": "does {a} eat {v}",
    "color": "is the color of {a} {v}",
    "job": "does {a} {v}",
    "workplace": "does {a} work in the {v}",
    "opposite": "is {v} the opposite of {s}",
    "next": "does {v} come after {s}",
}
"""Yes-or-no questions."""


def _ask_claim(rng: np.random.Generator) -> Question:
    name = pick(rng, list(_CLAIMS))
    relation = RELATIONS[name]
    subject = pick(rng, list(relation.facts))
    true = bool(rng.integers(2))
    value = relation.facts[subject] if true else _weighted(rng, name, relation.false_values(subject), 1)[0]
    stem = _CLAIMS[name].format(s=subject, a=article(subject), v=value)
    gold, wrong = ("true", "false") if true else ("false", "true")
    return Question(f"{name}/{subject}", "boolq", f"{stem} ?", gold, (wrong,), f"{stem} ? {relation.facts[subject]}")


def _ask_who(rng: np.random.Generator) -> Question:
    facts = RELATIONS["need"].facts
    subject = pick(rng, list(facts))
    other = pick(rng, RELATIONS["need"].false_subjects(facts[subject]))
    name, other_name = sample(rng, NAMES, 2)
    pairs = [(name, subject), (other_name, other)]
    first, second = (pairs[i] for i in rng.permutation(2))
    stem = f"{first[0]} was {first[1]} and {second[0]} was {second[1]} , so _ {facts[subject]} ."
    return Question(f"need/{subject}", "winogrande", stem, name, (other_name,), f"{stem.replace('_', name)} {name}")


def _ask_size(rng: np.random.Generator) -> Question:
    low, high = sorted(int(i) for i in rng.permutation(len(SIZES))[:2])
    bigger = bool(rng.integers(2))
    gold, wrong = (SIZES[high], SIZES[low]) if bigger else (SIZES[low], SIZES[high])
    first, second = sample(rng, [gold, wrong], 2)
    stem = f"we looked at the {first} and the {second} , and the _ was much {'bigger' if bigger else 'smaller'} ."
    return Question(f"size/{SIZES[low]}/{SIZES[high]}", "winogrande", stem, gold, (wrong,), f"{stem.replace('_', gold)} {gold}")


_ASKERS: list[tuple[Callable[[np.random.Generator], Question], float]] = [
    (_ask_value, 0.5),
    (_ask_subject, 0.18),
    (_ask_claim, 0.14),
    (_ask_who, 0.12),
    (_ask_size, 0.06),
]
"""Question generators and their shares."""


def make_question(rng: np.random.Generator) -> Question:
    """Returns a random question of any split."""
    return _ASKERS[int(rng.choice(len(_ASKERS), p=[share for _, share in _ASKERS]))][0](rng)


def options_of(question: Question, rng: np.random.Generator, count: int | None = None) -> list[str]:
    """Returns the gold option and `count` wrong ones (by default those that the form shows), in random order."""
    wrong = _weighted(rng, question.fact.split("/")[0], list(question.wrong), count or NUM_OPTIONS[question.form] - 1)
    return sample(rng, [question.gold, *wrong], len(wrong) + 1)


def _listed(label: str, options: list[str], gap: str = " ") -> str:
    return gap.join(f"{label}{i}: {option}" for i, option in enumerate(options, 1))


def _choices(label: str, count: int) -> str:
    return "/".join(f"{label}{i}" for i in range(1, count + 1))


def _render(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """Returns the prompt in the form of the question's set, and the gold label."""
    if question.form == "boolq":
        text = f"Please answer the following question with true or false, question: {question.stem}\n\nAnswer format: true/false"
        return text, question.gold
    options = options_of(question, rng)
    label = {"piqa": "solution", "winogrande": "option", "hellaswag": "ending"}.get(question.form, "answer")
    shown = _listed(label.capitalize(), options, "\n\n" if question.form == "piqa" else " ")
    opening = {
        "piqa": "Please choose the correct solution to the question:",
        "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence:",
        "hellaswag": "Please choose the correct ending to complete the given sentence:",
    }.get(question.form, "Please choose the correct answer to the question:")
    gap = " " if question.form == "winogrande" else "\n\n"
    text = f"{opening} {question.stem}\n\n{shown}{gap}Answer format: {_choices(label, len(options))}"
    return text, f"{label}{options.index(question.gold) + 1}"


def draw(split: str, count: int, seed: int) -> list[Example]:
    """Returns up to `count` different examples of the split, with at most one true and one false claim per fact for balance."""

    def make(rng: np.random.Generator) -> tuple[str, Example] | None:
        question = make_question(rng)
        if split_of(question.fact) != split:
            return None
        text, answer = _render(question, rng)
        key = f"{question.fact}/{answer}" if question.form == "boolq" else text
        found = "" if question.form == "boolq" else f" is {answer}"
        response = f"{question.reason}{found} so the correct answer is {answer}"
        return key, Example("commonsense", Family.commonsense, f"{text}\n\n", response, answer)

    return draw_unique(make, count, numpy_generator(seed, "embedded", "commonsense", split))

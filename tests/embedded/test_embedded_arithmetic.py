"""The word problems against solvers written independently of the generator."""

import re

import pytest

from fedsim.embedded import examples
from fedsim.types import Example, Family

STEP = re.compile(r"(First|Then) (\d+) ([-+x/]) (\d+) = (\d+) \.")


@pytest.fixture(scope="module")
def problems() -> list[Example]:
    return examples(Family.arithmetic, "train", 3000, 0) + examples(Family.arithmetic, "test", 1000, 0)


def story_of(example: Example) -> str:
    return example.prompt.removeprefix("Problem: ").removesuffix("\n\nWorked solution:\n")


def numbers_of(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


def test_every_worked_step_is_true_and_the_last_one_is_the_answer(problems):
    for example in problems:
        *lines, last = example.response.split("\n")
        assert 1 <= len(lines) <= 3
        for line in lines:
            _, left, sign, right, value = STEP.fullmatch(line).groups()
            assert eval(f"{left} {sign.replace('x', '*')} {right}") == int(value), line
        assert last == f"#### {example.answer}" == f"#### {value}"


def test_every_number_of_a_step_is_in_the_story_or_was_worked_out_before(problems):
    for example in problems:
        known = set(numbers_of(story_of(example)))
        for _, left, _, right, value in STEP.findall(example.response):
            assert int(left) in known
            assert int(right) in known
            known.add(int(value))


def _count_now(story: str) -> int | None:
    """Solves a story of things had, gained and lost by keeping count; None for any other story."""
    thing, who = re.search(r"How many (\w+) does (\w+) have now \?", story).groups()
    have: int | None = None
    for sentence in story.split(" . ")[:-1]:
        count = numbers_of(sentence)
        if re.fullmatch(rf"{who} has \d+ {thing}", sentence):
            have = count[0]
        elif re.fullmatch(rf"{who} (buys|finds) \d+ more|\w+ gives \d+ to {who}|{who} gets \d+ from \w+", sentence):
            have = None if have is None else have + count[0]
        elif re.fullmatch(rf"{who} (loses|sells) \d+ of them|{who} gives \d+ to \w+|\w+ gets \d+ from {who}", sentence):
            have = None if have is None else have - count[0]
        elif not re.fullmatch(r"(The friend )?\w+ (also )?has \d+ \w+", sentence):
            return None
    return have


def test_keeping_count_through_the_story_gives_the_same_answer(problems):
    read = [(_count_now(story_of(e)), int(e.answer)) for e in problems if "have now ?" in e.prompt]
    solved = [(own, gold) for own, gold in read if own is not None]
    assert len(solved) > 800
    assert all(own == gold for own, gold in solved)


def test_surface_rules_answer_few_problems(problems):
    def share(rule):
        return sum(rule(numbers_of(story_of(e)), story_of(e)) == int(e.answer) for e in problems) / len(problems)

    rules = {
        "sum of all": lambda n, story: sum(n),
        "difference of the first two": lambda n, story: abs(n[0] - n[1]) if len(n) > 1 else n[0],
        "product of the first and the last": lambda n, story: n[0] * n[-1],
        "last number": lambda n, story: n[-1],
        "minus if something is given": lambda n, story: n[0] - n[-1] if re.search("gives|sells|loses|left", story) else sum(n),
    }
    shares = {name: share(rule) for name, rule in rules.items()}
    assert max(shares.values()) < 0.35, shares


def test_distractors_steps_and_operations_are_all_common(problems):
    steps = [len(STEP.findall(e.response)) for e in problems]
    assert all(steps.count(n) / len(steps) > 0.05 for n in (1, 2, 3))
    for sign in "+-x/":
        assert sum(f" {sign} " in e.response for e in problems) / len(problems) > 0.05
    unused = [set(numbers_of(story_of(e))) - set(numbers_of(e.response)) for e in problems]
    assert sum(map(bool, unused)) / len(problems) > 0.2

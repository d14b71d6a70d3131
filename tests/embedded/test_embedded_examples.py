"""Guarantees of the embedded examples that hold for both families."""

import re

import pytest

from fedsim.embedded import FAMILIES, examples
from fedsim.errors import UserError
from fedsim.types import Example, Family


def question_of(example: Example) -> tuple[str, str]:
    """The story or question alone, and the right answer in words ("which of these is red ?" has many)."""
    question = example.prompt.split("\n\n")[0].split(":", 1)[1].strip()
    gold = re.search(rf"{example.answer.capitalize()}: (.*?)(?= [A-Z][a-z]+\d:| Answer format:|\n\n)", example.prompt)
    return question, gold.group(1) if gold else example.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_test_share_no_question_for_any_two_seeds(family):
    train = {question_of(e) for seed in range(3) for e in examples(family, "train", 1500, seed)}
    test = {question_of(e) for seed in range(3, 8) for e in examples(family, "test", 300, seed)}
    assert not train & test
    assert len(train) > 2000
    assert len(test) > 400


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_gives_the_same_examples_and_a_shorter_list_is_a_prefix(family):
    assert examples(family, "test", 200, 7) == examples(family, "test", 200, 7)
    assert examples(family, "train", 50, 7) == examples(family, "train", 200, 7)[:50]
    assert examples(family, "train", 50, 7) != examples(family, "train", 50, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_occurs_twice(family):
    found = examples(family, "train", 2000, 0)
    assert len({e.prompt for e in found}) == 2000
    assert {e.family for e in found} == {family}
    assert {e.task for e in found} == {family.name}


def test_an_unknown_split_and_too_many_examples_raise_user_errors(monkeypatch):
    with pytest.raises(UserError, match="'train' or 'test', got 'dev'"):
        examples(Family.arithmetic, "dev", 1, 0)
    monkeypatch.setattr("fedsim.embedded.commonsense.make_question", lambda rng: ONLY_QUESTION)
    with pytest.raises(UserError, match=r"at most \d+ embedded commonsense train examples, got 500; ask for fewer"):
        examples(Family.commonsense, "train", 500, 0)


def _only_question():
    from fedsim.embedded.commonsense import Question

    return Question("color/grass", "boolq", "is the color of grass green ?", "true", ("false",), "the color of grass is green")


ONLY_QUESTION = _only_question()

"""The multiple-choice questions: correct, balanced, and not answerable by surface rules."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from fedsim.core.answers import is_correct
from fedsim.embedded import examples
from fedsim.embedded.commonsense import NUM_OPTIONS, make_question, options_of
from fedsim.embedded.knowledge import RELATIONS
from fedsim.embedded.splits import split_of
from fedsim.types import Example, Family

OPTION = re.compile(r"(?:Answer|Solution|Option|Ending)(\d): (.*?)(?= (?:Answer|Solution|Option|Ending)\d:| Answer format:|\n\n)")


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return examples(Family.commonsense, "train", 4000, 0)


@pytest.fixture(scope="module")
def test() -> list[Example]:
    return examples(Family.commonsense, "test", 1000, 0)


def options(example: Example) -> list[str]:
    return [text for _, text in OPTION.findall(example.prompt)]


def test_the_gold_label_is_in_the_answer_format_and_the_response_names_it(train, test):
    for example in train + test:
        allowed = example.prompt.split("Answer format: ")[1].strip().split("/")
        assert example.answer in allowed
        assert example.response.endswith(f" so the correct answer is {example.answer}")
        assert is_correct(example.response, example)
        shown = options(example)
        assert len(shown) == (0 if allowed == ["true", "false"] else len(allowed))
        assert len(set(shown)) == len(shown)


def test_gold_positions_are_balanced_in_every_form(train):
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        counts[example.prompt.split("Answer format: ")[1]][example.answer] += 1
    assert len(counts) == 6  # true/false, answer1-3 and 1-4, solution, option, ending
    for labels in counts.values():
        expected = sum(labels.values()) / len(labels)
        chi_square = sum((n - expected) ** 2 / expected for n in labels.values())
        assert chi_square < 16.3, labels  # 99.9th percentile at three degrees of freedom


def test_the_gold_option_is_a_fact_and_no_wrong_option_is():
    rng = np.random.default_rng(0)
    for _ in range(5000):
        question = make_question(rng)
        name, *subject = question.fact.split("/")
        shown = options_of(question, rng)
        assert shown.count(question.gold) == 1
        assert len(shown) == NUM_OPTIONS[question.form] == len(set(shown))
        if name == "size" or question.form in ("boolq", "winogrande"):
            continue
        facts = RELATIONS[name].facts
        true = {facts[subject[0]]} | {value for s, value in RELATIONS[name].exceptions if s == subject[0]}
        if question.gold == facts[subject[0]]:
            assert not true & (set(shown) - {question.gold})
        else:
            holders = {s for s, value in facts.items() if value == facts[subject[0]]}
            nouns = {re.sub("^(an?|the) ", "", option) for option in shown}
            assert nouns & holders == {subject[0]}


def test_no_fact_is_asked_for_in_both_splits():
    rng = np.random.default_rng(1)
    facts = {make_question(rng).fact for _ in range(20000)}
    share = sum(split_of(fact) == "test" for fact in facts) / len(facts)
    assert 0.14 < share < 0.26
    assert len(facts) > 600


def _accuracy(test, guess):
    asked = [(e, options(e)) for e in test if options(e)]
    return sum(int(e.answer[-1]) - 1 == guess(shown) for e, shown in asked) / len(asked)


def test_position_length_and_word_frequency_stay_near_chance(train, test):
    chance = np.mean([1 / len(options(e)) for e in test if options(e)])
    gold, seen = Counter(), Counter()
    for example in train:
        shown = options(example)
        seen.update(word for option in shown for word in option.split())
        if shown:
            gold.update(shown[int(example.answer[-1]) - 1].split())

    def by_words(shown):
        return int(np.argmax([np.mean([(gold[w] + 1) / (seen[w] + 3) for w in option.split()]) for option in shown]))

    rules = {
        "first": lambda shown: 0,
        "longest": lambda shown: int(np.argmax([len(o) for o in shown])),
        "shortest": lambda shown: int(np.argmin([len(o) for o in shown])),
        "word frequency": by_words,
    }
    found = {name: _accuracy(test, rule) for name, rule in rules.items()}
    assert max(found.values()) < chance + 0.1, (chance, found)


def test_guessing_true_or_false_from_the_words_of_a_claim_stays_near_chance(train, test):
    true, seen = Counter(), Counter()
    for example in train:
        if "/false" in example.prompt:
            words = example.prompt.split("question: ")[1].split("\n")[0].split()
            seen.update(words)
            true.update(words if example.answer == "true" else [])
    claims = [e for e in test if "/false" in e.prompt]

    def says_true(example):
        words = example.prompt.split("question: ")[1].split("\n")[0].split()
        return sum(np.log((true[w] + 1) / (seen[w] - true[w] + 1)) for w in words) > 0

    accuracy = np.mean([says_true(e) == (e.answer == "true") for e in claims])
    assert accuracy < 0.65

"""The base model's corpus holds no task forms, no test problems and no choices about test facts."""

import re

import numpy as np
import pytest

from fedsim.embedded import corpus, examples
from fedsim.embedded.commonsense import NAMES, SUBJECT_STEMS, VALUE_STEMS
from fedsim.embedded.knowledge import RELATIONS, article
from fedsim.embedded.splits import split_of
from fedsim.types import Family

DOCUMENTS = [text for part, _ in corpus.STAGES for text in corpus.documents(0, part, 3000)]
TEXT = "\n".join(DOCUMENTS)


def test_the_task_forms_do_not_occur_in_the_corpus():
    for form in ("answer format", "####", "the correct answer is", "worked solution:", "please choose the correct", "please answer"):
        assert form not in TEXT.lower(), form
    assert not re.search(r"(answer|solution|option|ending)\d", TEXT, re.IGNORECASE)
    assert "#### " not in TEXT
    assert not re.search(r"(First|Then) \d", TEXT)


def test_every_fact_of_the_knowledge_base_occurs_in_the_statements():
    text = "\n".join(corpus.statements(np.random.default_rng(i)) for i in range(8000))
    missing = [
        (name, subject)
        for name, relation in RELATIONS.items()
        for subject, value in relation.facts.items()
        if not re.search(rf"{re.escape(subject)}\b.*{re.escape(value)}|{re.escape(value)}\b.*{re.escape(subject)}", text)
    ]
    assert not missing


def test_no_test_problem_occurs_in_the_corpus():
    problems = {e.prompt.removeprefix("Problem: ").split("\n")[0] for e in examples(Family.arithmetic, "test", 3000, 0)}
    asked = 0
    for problem in problems:
        story, _, question = problem.rpartition(" How many")
        for found in re.finditer(re.escape(story), TEXT):  # a longer story may begin alike, but asks something else
            asked += f"How many{question}" in TEXT[found.end() : found.end() + 60]
    assert sum("How many" in text for text in DOCUMENTS) > 1000
    assert asked == 0


def test_documents_depend_on_seed_and_part_only():
    assert list(corpus.documents(3, 2, 50)) == list(corpus.documents(3, 2, 50))
    assert list(corpus.documents(3, 2, 50)) != list(corpus.documents(3, 4, 50)) != list(corpus.documents(4, 4, 50))


def _stems(name: str, subject: str) -> list[str]:
    """The plain questions that ask for a fact and no other fact; every person is called N."""
    facts = RELATIONS[name].facts
    value = facts[subject]
    stems = VALUE_STEMS.get(name, []) + (SUBJECT_STEMS.get(name, []) if list(facts.values()).count(value) == 1 else [])
    return [stem.format(s=subject, a=article(subject), v=value, name="N") for _, stem in stems] or [f"so _ {value}"]


@pytest.mark.parametrize("kind", [corpus.choice, corpus.spoken_choice, corpus.restated_choice, corpus.matches, corpus.people])
def test_no_options_are_shown_for_a_fact_of_the_test_split(kind):
    text = "\n".join(kind(np.random.default_rng(i)) for i in range(1500))
    text = re.sub(rf"\b({'|'.join(NAMES)})\b", "N", text)
    asked = [(name, subject) for name, r in RELATIONS.items() for subject in r.facts if any(stem in text for stem in _stems(name, subject))]
    assert len(asked) > (10 if kind is corpus.people else 300)
    assert not [fact for fact in asked if split_of("/".join(fact)) == "test"]

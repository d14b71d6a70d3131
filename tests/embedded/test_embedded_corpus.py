"""What the base model has read: never the tasks' forms, never a test problem, no choice about a test fact."""

import re

import numpy as np

from fedsim.embedded import corpus, examples
from fedsim.embedded.knowledge import RELATIONS
from fedsim.types import Family

DOCUMENTS = list(corpus.documents(0, 1, 6000))
TEXT = "\n".join(DOCUMENTS)


def test_the_task_forms_do_not_occur():
    for form in ("answer format", "####", "the correct answer is", "worked solution:", "please choose the correct", "please answer"):
        assert form not in TEXT.lower(), form
    assert not re.search(r"(answer|solution|option|ending)\d", TEXT, re.IGNORECASE)
    assert "#### " not in TEXT
    assert not re.search(r"(First|Then) \d", TEXT)


def test_every_fact_of_the_knowledge_base_occurs():
    text = "\n".join(corpus.statements(np.random.default_rng(i)) for i in range(8000))
    missing = [
        (name, subject)
        for name, relation in RELATIONS.items()
        for subject, value in relation.facts.items()
        if not re.search(rf"{re.escape(subject)}\b.*{re.escape(value)}|{re.escape(value)}\b.*{re.escape(subject)}", text)
    ]
    assert not missing


def test_no_test_problem_occurs():
    stories = {e.prompt.removeprefix("Problem: ").split(" How many")[0] for e in examples(Family.arithmetic, "test", 3000, 0)}
    told = {re.split(r" \w+ asks : How many", text)[0] for text in DOCUMENTS if "thinks :" in text}
    assert len(told) > 1000
    assert not stories & told


def test_documents_depend_on_seed_and_part_only():
    assert list(corpus.documents(3, 2, 50)) == list(corpus.documents(3, 2, 50))
    assert list(corpus.documents(3, 2, 50)) != list(corpus.documents(3, 4, 50))

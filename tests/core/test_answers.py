import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.answers import boxed, extract, is_correct, options, value
from fedsim.types import Example, Family

DATA = Path(__file__).resolve().parents[2] / "../shared/data"


def arithmetic(answer="18"):
    return Example("gsm8k", Family.arithmetic, "How many?", "", answer)


def choice(answer="answer2", choices="answer1/answer2/answer3"):
    return Example("openbookqa", Family.commonsense, f"Pick one.\n\nAnswer format: {choices}\n\n### Response:\n", "", answer)


@pytest.mark.parametrize(
    ("text", "ended", "right"),
    [
        ("Paris, of course.", True, True),
        ("\n Paris,  of\ncourse. ", True, True),
        ("Paris, of course.", False, False),  # did not end
        ("Paris, of course", True, False),
        ("paris, of course.", True, False),
        ("It is Paris, of course.", True, False),
        ("", True, False),
    ],
)
def test_a_free_text_answer_must_match_the_whole_reference_up_to_whitespace(text, ended, right):
    assert is_correct(text, Example("own", Family.text, "Where?", "", "Paris, of course. "), ended=ended) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 18\n#### 19", "18"),  # what follows the first answer is run-on
        ("The answer is: 3\n#### 18", "18"),
        ("####\n", None),
        ("#### none of them\n7", "none of them"),
        ("7 eggs are left. The answer is: 18", "18"),
        ("The answer is: 3. No, wait. The answer is: 18.", "18"),
        ("the answer is 18 dollars", "18"),
        ("The answer is: $\\boxed{18}$. I hope it is correct.", "18"),
        (r"so $\boxed{18}$ of 24", "18"),
        ("16 - 7 = 9, 9 * 2 = 18", "18"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_an_arithmetic_answer_is_read_in_order_of_precedence(text, expected):
    assert extract(text, arithmetic()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 x 5 = 20 . 20 - 12 = 8 .\n8\n\nstory : Ann has 32", None),
        ("16 - 7 = 9, 9 * 2 = 18", None),
        ("9 * 2 = 18\n#### 18\n\nstory : Ann has 32", "18"),
        ("The answer is: 18. Ann has 32", "18"),
        (r"so $\boxed{18}$ of 24", "18"),
        (r"so 18 $\boxed{1", None),
    ],
)
def test_the_last_number_of_a_cut_off_answer_does_not_count(text, expected):
    assert extract(text, arithmetic(), ended=False) == expected
    assert is_correct(text, arithmetic(), ended=False) is (expected is not None)


def test_the_first_option_of_a_cut_off_answer_counts_because_more_text_cannot_change_it():
    assert is_correct("the correct answer is answer2 , and", choice(), ended=False)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("18", Fraction(18)),
        (" 18. ", Fraction(18)),
        ("1,080", Fraction(1080)),
        ("1,234,567.50", Fraction("1234567.5")),
        ("-3", Fraction(-3)),
        ("\u22123", Fraction(-3)),
        ("- 3", None),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        ("$18", Fraction(18)),
        (r"\$18.00", Fraction(18)),
        ("\u20ac5", Fraction(5)),
        ("50%", Fraction(50)),
        (r"90^\circ", Fraction(90)),
        ("x = 5", Fraction(5)),
        ("7 apples", Fraction(7)),
        (r"12\text{ cm}", Fraction(12)),
        ("007", Fraction(7)),
        ("1/0", None),
        ("12,34", None),
        ("two", None),
        ("", None),
        ("3 + 4", None),
        (r"\sqrt{2}", None),
    ],
)
def test_a_number_is_read_by_value(written, number):
    assert value(written) == number


@given(st.integers(-(10**15), 10**15))
def test_any_integer_is_read_with_and_without_separators(number):
    assert value(str(number)) == value(f"{number:,}") == value(f"{number}.0") == number
    assert is_correct(f"so we get {number:,}", arithmetic(str(number)))


@given(st.integers(-999, 999), st.integers(1, 999))
def test_any_fraction_is_read_in_each_notation(above, below):
    sign, size = ("-" if above < 0 else ""), abs(above)
    assert value(f"{above}/{below}") == value(f"{sign}\\frac{{{size}}}{{{below}}}") == Fraction(above, below)


@given(st.text(max_size=60))
def test_arbitrary_text_never_crashes_the_parsers(text):
    for example in (arithmetic(), arithmetic(r"\sqrt{2}"), choice()):
        given_answer = extract(text, example)
        assert given_answer is None or given_answer
        is_correct(text, example)
    value(text)
    boxed(text)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("#### 18.00", "18", True),
        ("#### 1080", "1,080", True),
        ("#### 180", "18", False),
        ("#### -18", "18", False),
        ("the answer is 0.75", r"\frac{3}{4}", True),
        (r"\boxed{\dfrac{3}{4}}", "3/4", True),
        (r"\boxed{ 2\sqrt3 }", r"2\sqrt{3}", True),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", True),
        (r"\boxed{(1,3)}", "(1,2)", False),
        (r"The answer is: x^2+1", "x^2 + 1", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        ("nothing here", "18", False),
    ],
)
def test_arithmetic_answers_are_compared_by_value_or_else_as_expressions(text, gold, right):
    assert is_correct(text, arithmetic(gold)) is right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{4} and \boxed{5", "4"),  # the last one was cut off
        (r"\fbox{6}", "6"),
        (r"$\boxed 7$ of them", "7"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed", None),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Which?\n\nAnswer format: answer1/answer2\n\n### Response:\n", ["answer1", "answer2"]),
        ("Option1: a Option2: b Answer format: option1/option2", ["option1", "option2"]),
        ("Answer format: a/b. Now, Answer format: true/false.", ["true", "false"]),
        ("How many?", []),
    ],
)
def test_the_options_are_those_of_the_last_answer_format(prompt, expected):
    assert options(prompt) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer3, not answer2", "answer3"),
        ("The correct answer is Answer2.", None),  # exactly as the prompt writes it
        ("answer4", None),  # not among the options
        ("answer21", None),
        ("manswer2", None),
        ("", None),
    ],
)
def test_a_choice_is_the_first_option_named(text, expected):
    assert extract(text, choice()) == expected


def test_a_longer_option_is_not_mistaken_for_its_prefix():
    assert extract("it is answer10", choice(choices="answer1/answer10")) == "answer10"


def test_without_options_in_the_prompt_no_choice_is_right():
    example = Example("boolq", Family.commonsense, "true or false?", "", "true")
    assert extract("true", example) is None
    assert not is_correct("true", example)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the project")
def test_every_reference_answer_of_the_real_sets_is_right():
    for file in sorted(DATA.glob("arithmetic/gsm8k_*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            gold = re.search(r"#### (.*)$", row["answer"])[1]
            assert is_correct(row["answer"], arithmetic(gold)), row
    for file in sorted(DATA.glob("commonsense/*/test.json")):
        for row in json.loads(file.read_text()):
            assert is_correct(row["output"], Example("", Family.commonsense, row["instruction"], "", row["answer"])), row

"""One row of each data set with the expected example, written by hand, and rows that are refused."""

import pytest

from fedsim.data.rows import Malformed
from fedsim.data.sets import SETS
from fedsim.types import Family, Turn

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
CHOICE = "Please choose the correct answer to the question: why?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"

GSM8K = {"question": "How many? ", "answer": "She has 2*3=<<2*3=6>>6.\n#### 1,006"}
METAMATH = {"query": "What is x?", "response": "We solve.\n#### 4\nThe answer is: 4", "type": "GSM_Rephrased"}
MATH = {"problem": "Find $x$.", "solution": "So $x = \\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
COMMONSENSE = {"instruction": CHOICE, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}


@pytest.mark.parametrize(
    ("name", "row", "instruction", "response", "answer"),
    [
        ("gsm8k", GSM8K, "How many?", "She has 2*3=6.\n#### 1,006", "1,006"),
        ("metamathqa", METAMATH, "What is x?", "We solve.\n#### 4\nThe answer is: 4", "4"),
        ("math", MATH | {"solution": "It is $\\fbox{2}$."}, "Find $x$.", "It is $\\fbox{2}$.", "2"),
        ("math", MATH, "Find $x$.", "So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("commonsense_170k", COMMONSENSE, CHOICE, "the correct answer is answer2", "answer2"),
        ("boolq", COMMONSENSE, CHOICE, "the correct answer is answer2", "answer2"),
    ],
)
def test_a_row_becomes_an_example(name, row, instruction, response, answer):
    example = SETS[name].example(row, name)
    own_line = "\n" if instruction == CHOICE else ""
    assert example.prompt == f"{HEAD}{instruction}\n\n### Response:{own_line}"
    assert (example.response, example.answer, example.task) == (response, answer, name)
    assert example.family is (Family.commonsense if instruction == CHOICE else Family.arithmetic)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Translate. ", "input": "", "output": " Bonjour."},
        {"instruction": "Translate.", "output": "Bonjour."},
        {"instruction": "Translate.", "context": None, "response": "Bonjour.", "category": "open_qa"},  # as Dolly has it
        {"question": "Translate.", "answer": "Bonjour."},
        {"query": "Translate.", "response": "Bonjour.", "prompt": "not this"},
    ],
)
def test_a_users_own_texts_are_read_in_the_columns_of_public_sets(row):
    example = SETS["instructions"].example(row, "mine")
    assert example.prompt == f"{HEAD}Translate.\n\n### Response:"
    assert (example.response, example.answer, example.task, example.family) == ("Bonjour.", "Bonjour.", "mine", Family.text)


def test_a_users_own_prompt_is_taken_verbatim():
    example = SETS["instructions"].example({"prompt": "<|user|>Hello?\n<|bot|>", "completion": " Yes.\n"}, "mine")
    assert (example.prompt, example.response, example.answer) == ("<|user|>Hello?\n<|bot|>", " Yes.\n", " Yes.\n")


QUESTION, ANSWER = Turn("user", "Translate."), "Bonjour."


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Translate. "}, {"role": "assistant", "content": " Bonjour."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Trans"}, {"type": "text", "text": "late."}]},
                *[{"role": "assistant", "content": "Bonjour.", "name": "a"}],
            ],
            "id": 3,
        },
        {"conversations": [{"from": "human", "value": "Translate."}, {"from": "gpt", "value": "Bonjour."}]},
        {"conversation": [{"role": "user", "content": "Translate."}, {"role": "model", "content": "Bonjour."}]},
        {"messages": None, "instruction": "Translate.", "output": "Bonjour."},
        {"conversation": "a7", "instruction": "Translate.", "output": "Bonjour."},
        {
            "conversations": [
                {"from": "system", "value": None},
                {"from": "gpt", "value": "Hi!"},
                {"from": "human", "value": "Translate."},
                {"from": "gpt", "value": "Bonjour."},
            ],
            "system": "",
        },
        {
            "messages": [
                {"role": None, "from": "prompter", "content": None, "value": "Translate."},
                {"role": "assistant", "from": None, "content": "Bonjour.", "value": None},
            ]
        },  # as in tables from several sources
    ],
)
def test_a_conversation_of_one_question_is_an_instruction_for_models_without_a_template(row):
    example = SETS["instructions"].example(row, "mine")
    assert example.prompt == f"{HEAD}Translate.\n\n### Response:"
    assert (example.response, example.answer, example.family) == (ANSWER, ANSWER, Family.text)
    assert example.turns == ((QUESTION,) if "instruction" not in row else ())


def test_a_longer_conversation_keeps_its_turns_and_its_last_one_is_the_response():
    said = [("developer", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Who?"), ("assistant", "Me.")]
    turns = [{"role": role, "content": content} for role, content in said]
    example = SETS["instructions"].example({"messages": turns}, "mine")
    assert SETS["instructions"].example({"messages": turns[1:], "system": "Be brief."}, "mine") == example
    assert example.turns == (("system", "Be brief."), *said[1:4])
    assert example.response == "Me."
    assert example.prompt == ("Be brief.\n\n### Instruction:\nHello?\n\n### Response:Yes.\n\n### Instruction:\nWho?\n\n### Response:")


def test_consecutive_turns_of_one_side_are_merged():
    said = [("user", "Hello?"), ("user", "Who?"), ("assistant", "Me."), ("assistant", "And you?")]
    example = SETS["instructions"].example({"messages": [{"role": role, "content": content} for role, content in said]}, "mine")
    assert example.turns == (("user", "Hello?\n\nWho?"),)
    assert example.response == "Me.\n\nAnd you?"


def test_a_users_own_instruction_includes_its_context():
    example = SETS["instructions"].example({"instruction": "Sum up.", "context": "A story.", "response": "Short."}, "mine")
    assert example.prompt.endswith("### Instruction:\nSum up.\n\n### Input:\nA story.\n\n### Response:")


def test_an_input_has_its_own_section():
    example = SETS["commonsense_170k"].example(COMMONSENSE | {"input": "A story. "}, "x")
    assert example.prompt.endswith(f"### Instruction:\n{CHOICE}\n\n### Input:\nA story.\n\n### Response:\n")
    assert "paired with an input" in example.prompt


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q"}, "expected the field 'answer', got 'question'"),
        ("gsm8k", GSM8K | {"question": 3}, "expected text in 'question', got 3"),
        ("gsm8k", GSM8K | {"question": " "}, "expected text in 'question'"),
        ("gsm8k", GSM8K | {"question": "\ud83d"}, "a lone surrogate"),
        ("gsm8k", GSM8K | {"question": None}, "expected text in 'question', got None"),
        ("gsm8k", GSM8K | {"answer": "six"}, "'#### <number>'"),
        ("gsm8k", GSM8K | {"answer": "six #### six"}, "'#### <number>'"),
        ("gsm8k", ["q", "a"], "expected an object with fields, got list"),
        ("metamathqa", METAMATH | {"response": "4"}, "The answer is: <answer>"),
        ("math", MATH | {"solution": "x = 2"}, "boxed"),
        ("math", MATH | {"solution": "\\boxed{2"}, "boxed"),
        ("boolq", COMMONSENSE | {"answer": "answer3"}, "one of the options answer1/answer2, got 'answer3'"),
        ("boolq", COMMONSENSE | {"instruction": "why?"}, "(none named)"),
        ("boolq", COMMONSENSE | {"input": 1}, "expected text in 'input', got 1"),
        ("instructions", {"text": "a"}, "expected the field 'instruction' or 'question' or 'query' or 'prompt', got 'text'"),
        ("instructions", {"instruction": "a"}, "expected the field 'output' or 'response' or 'answer' or 'completion', got 'instruction'"),
        ("instructions", {"prompt": "a"}, "expected the field 'completion' or 'response' or 'output' or 'answer', got 'prompt'"),
        ("instructions", {"instruction": "a", "output": " "}, "expected text in 'output'"),
        ("instructions", {"instruction": "a", "context": ["b"], "output": "c"}, "expected text in 'context', got ['b']"),
        ("instructions", {"instruction": "a", "input": "\ud83d", "output": "c"}, "a lone surrogate"),
        ("instructions", ["a", "b"], "expected an object with fields, got list"),
        ("instructions", {"messages": "a"}, "expected a list of turns in 'messages', got 'a'"),
        ("instructions", {"messages": []}, "expected turns in 'messages' that end with an assistant's to a user, got none"),
        ("instructions", {"messages": [{"role": "user", "content": "a"}]}, "end with an assistant's to a user, got user"),
        ("instructions", {"conversations": [{"from": "gpt", "value": "a"}]}, "end with an assistant's to a user, got none"),
        ("instructions", {"messages": ["a"]}, "expected turns with role and content in 'messages', got 'a'"),
        ("instructions", {"messages": [{"role": "tool", "content": "a"}]}, "expected turns of system, user and assistant in 'messages'"),
        ("instructions", {"messages": [{"role": "user", "content": None}]}, "expected the field 'content' or 'value', got 'role'"),
        ("instructions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected the field 'text', got 'type'"),
        ("instructions", {"messages": [{"content": "a"}]}, "expected the field 'role' or 'from', got 'content'"),
    ],
)
def test_an_unusable_row_is_malformed_with_a_reason(name, row, message):
    with pytest.raises(Malformed) as caught:
        SETS[name].example(row, name)
    assert message in str(caught.value)

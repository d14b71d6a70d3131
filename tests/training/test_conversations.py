"""Conversations in chat templates like those of public models, against the template's own output."""

import math

import pytest
from test_encoding import bert_like

from fedsim.choices import TrainOn
from fedsim.errors import UserError
from fedsim.training.conversations import check, end_of_turn, in_alpaca, rendered, shorter
from fedsim.training.encoding import PROMPT_SHARE, encode, encode_prompts, end_tokens
from fedsim.types import Example, Family, Turn

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ message.role }} {{ message.content }} {% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }} {{ messages[-1].content }}"

WORDS = ["user", "assistant", "system", "tom", "has", "apples", "1", "2"]
QUESTION = [Turn("user", "tom"), Turn("assistant", "has 1"), Turn("user", "apples")]


def tokenizer_with(template):
    tokenizer = bert_like()
    tokenizer.add_tokens(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat(turns, response="1 2"):
    return Example("t", Family.text, in_alpaca(turns), response, response, turns=tuple(turns))


PLAIN = Example("t", Family.text, "tom has", "2", "2")


def by_template(tokenizer, turns):
    chat_messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return list(tokenizer.apply_chat_template(chat_messages, add_generation_prompt=True)["input_ids"])


def test_prompts_have_the_templates_form_at_training_and_at_generation():
    tokenizer = tokenizer_with(CHATML)
    expected = by_template(tokenizer, QUESTION)
    plain = next(encode_prompts([PLAIN], tokenizer))
    assert list(encode_prompts([PLAIN, chat(QUESTION), chat(QUESTION), PLAIN], tokenizer)) == [plain, expected, expected, plain]
    trained = encode([PLAIN, chat(QUESTION)], tokenizer, 100, TrainOn.response)[1]
    response = tokenizer("1 2", add_special_tokens=False)["input_ids"]
    assert trained.input_ids.tolist() == [*expected, *response, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert trained.loss_start == len(expected)


def test_only_conversations_end_with_the_end_of_turn_token():
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens([PLAIN, chat(QUESTION)], tokenizer) == [tokenizer.eos_token_id, end]
    assert end_tokens([PLAIN, chat(QUESTION)], tokenizer_with(None)) == [tokenizer.eos_token_id] * 2


def test_without_a_template_a_conversation_is_encoded_as_its_prompt_with_the_end_of_sequence():
    tokenizer = tokenizer_with(None)
    same = Example("t", Family.text, in_alpaca(QUESTION), "2", "2")
    conversation, plain = encode([chat(QUESTION, "2"), same], tokenizer, 100, TrainOn.response)
    assert conversation == plain
    assert conversation.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (WITHOUT_SYSTEM, "[SEP]")])
def test_a_turn_ends_with_the_templates_own_token_or_the_end_of_sequence(template, end):
    tokenizer = tokenizer_with(template)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_unknown_tokens_and_spaces_do_not_end_a_turn():
    tokenizer = tokenizer_with("{% for message in messages %}{{ message.content }} strange {% endfor %}")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_without_a_system_role_in_the_template_system_text_begins_the_next_question():
    tokenizer = tokenizer_with(WITHOUT_SYSTEM)
    merged = [Turn("user", "has 2\n\ntom"), QUESTION[1], Turn("user", "1\n\napples")]
    with_system = [Turn("system", "has 2"), *QUESTION[:2], Turn("system", "1"), QUESTION[2]]
    assert rendered(with_system, tokenizer) == rendered(merged, tokenizer)


def test_templates_are_rendered_with_thinking_disabled():
    template = "{{ messages[-1].content }}{% if enable_thinking is defined and not enable_thinking %} has{% endif %}"
    assert rendered(QUESTION, tokenizer_with(template)) == "apples has"


def test_check_reports_a_conversation_that_a_template_refuses():
    tokenizer, twice = tokenizer_with(WITHOUT_SYSTEM), [Turn("user", "tom"), Turn("user", "has")]
    check([PLAIN, chat(QUESTION)], tokenizer)
    with pytest.raises(UserError, match=r"refuses a conversation of user, user: Conversation roles must alternate\. Leave such rows out"):
        check([PLAIN, chat(QUESTION), chat(twice)], tokenizer)
    check([chat(twice)], tokenizer_with(None))


def test_a_template_that_shows_the_date_always_shows_the_same_one():
    assert rendered(QUESTION, tokenizer_with(DATED)).startswith("26 Jul 2024")


def test_the_oldest_exchanges_of_a_conversation_that_is_too_long_are_left_out():
    tokenizer = tokenizer_with(CHATML)
    system = Turn("system", "has")
    whole = [system, *QUESTION, Turn("assistant", "2"), Turn("user", "1")]
    once, twice = [system, *whole[3:]], [system, whole[-1]]
    assert shorter(whole) == once
    assert shorter(once) == twice
    assert shorter(twice) is None
    for turns in (whole, once, twice):
        expected = by_template(tokenizer, turns)
        room = math.ceil(len(expected) / PROMPT_SHARE)
        assert list(encode_prompts([chat(whole)], tokenizer, room)) == [expected]
        (trained,) = encode([chat(whole)], tokenizer, room, TrainOn.response)
        assert trained.loss_start == len(expected)
        bare = tokenizer_with(None)
        plain = next(encode_prompts([Example("t", Family.text, in_alpaca(turns), "", "")], bare))
        assert list(encode_prompts([chat(whole)], bare, math.ceil(len(plain) / PROMPT_SHARE))) == [plain]
    assert list(encode_prompts([chat(whole)], tokenizer)) == [by_template(tokenizer, whole)]
    assert list(encode_prompts([chat(whole)], tokenizer, 3)) == [by_template(tokenizer, twice)]

"""The tokenizer and the model as files."""

import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.embedded import BASE_MODEL, FAMILIES, examples


@pytest.fixture(scope="module")
def words():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_encodes_and_decodes_exactly(words, text):
    ids = words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert words.decode(ids) == text


def test_every_word_and_every_digit_of_the_tasks_is_one_token(words):
    for family in FAMILIES:
        for example in examples(family, "test", 200, 5):
            text = example.prompt + example.response
            pieces = words.convert_ids_to_tokens(words(text, add_special_tokens=False)["input_ids"])
            assert len(pieces) <= len(text.split()) + sum(map(text.count, "0123456789:/?,#\n"))
            assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)


def test_special_tokens_are_set_and_a_text_starts_with_bos(words, model):
    assert (words.pad_token, words.bos_token, words.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert words("a")["input_ids"][0] == words.bos_token_id == model.config.bos_token_id
    assert model.config.vocab_size == len(words)


def test_the_model_loads_offline_and_knows_a_number_fact(words, model, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("network"))
    ids = words("12 + 5 = 17 . 30 - 9 = 21 . 6 x 7 =", return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert words.decode(out[0, ids.shape[1] :]) == " 42"


def test_the_files_stay_below_ten_megabytes():
    assert sum(file.stat().st_size for file in Path(BASE_MODEL).rglob("*")) < 10e6


def test_before_fine_tuning_the_model_does_not_write_in_the_tasks_forms(words, model):
    for family in FAMILIES:
        for example in examples(family, "test", 3, 0):
            ids = words(example.prompt, return_tensors="pt")["input_ids"]
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            text = words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert "####" not in text
            assert "the correct answer is" not in text

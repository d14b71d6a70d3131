import random
from pathlib import Path

import pytest

from fedsim.choices import TrainOn
from fedsim.embedded import BASE_MODEL, FAMILIES, examples
from fedsim.training.encoding import describe_limit, encode, encode_prompts, end_tokens, has_response, is_truncated
from fedsim.types import Example, Family

STORIES = Path(__file__).resolve().parents[2] / "../shared/data/models/stories260K"
EXAMPLE = Example("t", Family.arithmetic, "tom has 1 2 apples .", "tom has 1 2 .\n#### 1 2", "12")


def bert_like():
    """A tokenizer that frames every text with a begin and an end, as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "tom", "has", "apples", "1", "2", ".", "#"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


def from_folder(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def with_an_end():
    """A tokenizer that ends every text, as Llama's with add_eos_token does, and adds no begin."""
    from tokenizers import processors

    tokenizer = bert_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    return tokenizer


TOKENIZERS = {
    "embedded": lambda: from_folder(BASE_MODEL),
    "bert": bert_like,
    "end": with_an_end,
    "stories": lambda: from_folder(STORIES),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    if request.param == "stories" and not STORIES.is_dir():
        pytest.skip("the real model is not beside the project")
    return TOKENIZERS[request.param]()


def one_text_at_a_time(example, tokenizer, max_length, train_on):
    """The plain way to encode."""
    prompt = tokenizer(example.prompt, verbose=False)["input_ids"]
    while len(prompt) > 1 and prompt[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id}:
        prompt = prompt[:-1]
    response = tokenizer(example.response, add_special_tokens=False, verbose=False)["input_ids"]
    ids = (prompt + response + [tokenizer.eos_token_id])[: min(max_length, tokenizer.model_max_length)]
    start = min(len(prompt), len(ids))
    return ids, 1 if train_on is TrainOn.all and start < len(ids) else start


def texts(count):
    """Examples of 1 to 49 words, known and unknown, with end-of-sequence tokens in the text."""
    rng = random.Random(count)
    words = ["tom", "has", "1", "2", "apples", ".", "zebra", "\n", "####", "é", "</s>", "[SEP]"]
    make = lambda: " ".join(rng.choices(words, k=rng.randrange(1, 50)))  # noqa: E731
    return [Example("t", Family.arithmetic, make(), make(), "1") for _ in range(count)]


@pytest.mark.parametrize("train_on", TrainOn)
@pytest.mark.parametrize(("max_length", "limit"), [(1000, 10**9), (30, 10**9), (1000, 25), (1, 10**9)])
def test_encoding_many_examples_gives_the_tokens_of_one_text_at_a_time(tokenizer, train_on, max_length, limit, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", limit)
    for count in (0, 1, 64, 130):
        chosen = texts(count)
        found = [(encoded.input_ids.tolist(), encoded.loss_start) for encoded in encode(chosen, tokenizer, max_length, train_on)]
        assert found == [one_text_at_a_time(example, tokenizer, max_length, train_on) for example in chosen]


def test_the_loss_is_on_the_response_and_the_end_of_sequence(tokenizer):
    (encoded,) = encode([EXAMPLE], tokenizer, 1000, TrainOn.response)
    response = tokenizer(EXAMPLE.response, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[encoded.loss_start :].tolist() == [*response, tokenizer.eos_token_id]
    assert has_response(encoded)


def test_the_prompt_in_training_is_the_prompt_of_generation(tokenizer):
    (encoded,), (prompt,) = encode([EXAMPLE], tokenizer, 1000, TrainOn.response), encode_prompts([EXAMPLE], tokenizer)
    assert encoded.input_ids[: encoded.loss_start].tolist() == prompt


def test_a_prompt_begins_as_the_tokenizer_does_and_has_no_end_token(tokenizer):
    (prompt,) = encode_prompts([EXAMPLE], tokenizer)
    assert prompt[0] == tokenizer(EXAMPLE.prompt)["input_ids"][0]
    assert not {tokenizer.eos_token_id, tokenizer.sep_token_id} & set(prompt[1:])
    assert tokenizer.decode(prompt[-1:]).strip() == "."


def test_train_on_all_puts_the_loss_on_every_token_but_the_first(tokenizer):
    (whole,), (response,) = (encode([EXAMPLE], tokenizer, 1000, train_on) for train_on in (TrainOn.all, TrainOn.response))
    assert whole.input_ids.tolist() == response.input_ids.tolist()
    assert whole.loss_start == 1


@pytest.mark.parametrize("train_on", TrainOn)
@pytest.mark.parametrize("max_length", range(1, 20))
def test_a_cut_removes_the_end_and_a_lost_response_has_no_loss(tokenizer, train_on, max_length):
    (full,), (cut,) = (encode([EXAMPLE], tokenizer, n, train_on) for n in (1000, max_length))
    prompt = len(next(encode_prompts([EXAMPLE], tokenizer)))
    assert cut.input_ids.tolist() == full.input_ids[:max_length].tolist()
    assert has_response(cut) == (max_length > prompt)
    assert is_truncated(cut, end_tokens([EXAMPLE], tokenizer)) == (max_length < full.num_tokens)
    assert cut.loss_start == (full.loss_start if max_length > prompt else max_length)


def test_the_limit_of_the_tokenizer_applies_too():
    tokenizer = bert_like()
    tokenizer.model_max_length = 8
    assert encode([EXAMPLE], tokenizer, 1000, TrainOn.response)[0].num_tokens == 8
    assert describe_limit(1000, tokenizer) == "8 tokens (data.max_length is 1000, but the model reads no more)"
    assert describe_limit(6, tokenizer) == "6 tokens (data.max_length)"


def test_the_tokens_of_embedded_examples_decode_to_their_response():
    tokenizer = from_folder(BASE_MODEL)
    for family in FAMILIES:
        chosen = examples(family, "test", 20, 0)
        for example, encoded in zip(chosen, encode(chosen, tokenizer, 1000, TrainOn.response), strict=True):
            assert tokenizer.unk_token_id not in encoded.input_ids
            assert tokenizer.decode(encoded.input_ids[encoded.loss_start :], skip_special_tokens=True).strip() == example.response

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY, adapted_model, tiny_model
from torch import nn
from torch.nn import functional

from fedsim.config import DataConfig, EvaluationConfig, ModelConfig
from fedsim.core.answers import extract, is_correct
from fedsim.embedded import examples
from fedsim.models import load_model
from fedsim.training.budget import TokenBudget
from fedsim.training.evaluation import evaluate, generate, mean_loss
from fedsim.types import EncodedExample, Example, Family

PAD = 0


def with_untied_head(model):
    """Unties the output layer: with tied random embeddings some architectures repeat one token forever."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.set_output_embeddings(nn.Linear(32, VOCABULARY, bias=False))
    return model.eval()


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, prompts, eos_id, max_new_tokens):
    """The oracle: transformers' own greedy search, one prompt at a time without padding; drops the end of sequence."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        found.append(output[: output.index(eos_id)] if eos_id in output else output)
    return found


def frequent_end(model, prompts, max_new_tokens):
    """Returns a token that ends some of the continuations, at different lengths."""
    unended = one_by_one(model, prompts, VOCABULARY, max_new_tokens)
    firsts = Counter(token for answer in unended for token in set(answer[2:]) - set(answer[:2]))
    return firsts.most_common(1)[0][0]


def batched(model, prompts, eos_id, max_new_tokens, tokens_per_pass=10_000):
    answers = generate(model, prompts, eos_id=eos_id, pad_id=PAD, max_new_tokens=max_new_tokens, budget=TokenBudget(tokens_per_pass))
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_generation_equals_transformers_one_prompt_at_a_time(architecture):
    model, prompts = with_untied_head(adapted_model(architecture)), prompts_of([5, 11, 3, 8, 8, 1, 14, 6])
    eos_id = frequent_end(model, prompts, 12)
    expected = one_by_one(model, prompts, eos_id, 12)
    assert len({len(answer) for answer in expected}) > 1  # rows leave the batch at different steps
    assert batched(model, prompts, eos_id, 12) == expected
    assert batched(model, prompts, eos_id, 12, tokens_per_pass=60) == expected
    assert batched(model, prompts, eos_id, 12, tokens_per_pass=1) == expected


def test_a_sliding_attention_window_is_kept_when_rows_leave_the_batch():
    model = with_untied_head(tiny_model("mistral"))
    model.config.sliding_window = 6
    prompts = prompts_of([5, 11, 3, 8, 2, 12])
    eos_id = frequent_end(model, prompts, 20)
    assert batched(model, prompts, eos_id, 20) == one_by_one(model, prompts, eos_id, 20)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_no_sequence_grows_beyond_the_context(architecture):
    model = with_untied_head(tiny_model(architecture))  # a context of 64
    prompts = prompts_of([4, 60, 63, 64, 70, 40])
    found = batched(model, prompts, VOCABULARY, 30)
    assert [len(answer) for answer in found] == [30, 4, 1, 0, 0, 24]
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer == (one_by_one(model, [prompt], VOCABULARY, len(answer))[0] if answer else [])


def test_an_answer_may_be_empty_and_a_batch_may_end_at_once():
    model, prompts = with_untied_head(tiny_model("llama")), prompts_of([4, 4, 9])
    first = {one_by_one(model, [prompt], VOCABULARY, 1)[0][0] for prompt in prompts}
    for eos_id in first:
        assert batched(model, prompts, eos_id, 5) == one_by_one(model, prompts, eos_id, 5)
    assert batched(model, [], VOCABULARY, 5) == []


def test_an_answer_has_ended_only_if_its_end_of_sequence_fits_the_limit_and_the_context():
    model, prompts = with_untied_head(tiny_model("llama")), prompts_of([4, 9, 60, 70])  # a context of 64
    eos_id = one_by_one(model, [prompts[0]], VOCABULARY, 3)[0][2]
    short, exact = (generate(model, prompts, eos_id=eos_id, pad_id=PAD, max_new_tokens=n, budget=TokenBudget(100)) for n in (2, 3))
    assert [answer.ended for answer in short] == [False] * 4
    assert exact[0].ended
    assert (exact[3].tokens, exact[3].ended) == ([], False)  # a prompt that fills the context
    for answer, expected in zip(exact, one_by_one(model, prompts[:3], eos_id, 3), strict=False):
        assert (answer.tokens, answer.ended) == (expected, len(expected) < 3)


def sizes_of_passes(model):
    """Records the (rows, tokens) of each forward pass from now on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    return seen


def test_rows_that_have_ended_leave_the_batch_when_they_are_half_of_it():
    model, prompts = with_untied_head(tiny_model("llama")), prompts_of([9] * 20)
    eos_id = frequent_end(model, prompts, 30)
    ends = {i: len(answer) for i, answer in enumerate(one_by_one(model, prompts, eos_id, 30)) if len(answer) < 30}
    expected, rows = [], len(ends)
    for step in range(max(ends.values()) + 1):
        expected.append(rows)
        alive = sum(end > step for end in ends.values())
        rows = alive if alive * 2 <= rows else rows
    seen = sizes_of_passes(model)
    batched(model, [prompts[i] for i in ends], eos_id, 30)
    assert seen == [(expected[0], 9), *((rows, 1) for rows in expected[1:])]  # and it stops when no row is left
    assert len(set(expected)) > 2


def test_out_of_memory_restarts_a_batch_with_fewer_rows_and_does_not_change_the_answers():
    model, prompts = with_untied_head(tiny_model("llama")), prompts_of([4, 9, 5, 7, 6, 8, 9, 4, 5])
    expected = batched(model, prompts, VOCABULARY, 6)

    def check(module, arguments, options):
        held = options["past_key_values"].get_seq_length() + options["input_ids"].shape[1]
        if held * len(options["input_ids"]) > 40:
            failed.append(len(options["input_ids"]))
            raise torch.OutOfMemoryError("no memory left")

    model.register_forward_pre_hook(check, with_kwargs=True)
    budget, done, failed = TokenBudget(10**9), [], []
    found = generate(
        model, prompts, eos_id=VOCABULARY, pad_id=PAD, max_new_tokens=6, budget=budget, on_progress=lambda count, _: done.append(count)
    )
    assert [answer.tokens for answer in found] == expected
    assert budget.tokens < 63
    assert failed == sorted(set(failed), reverse=True), "no batch is tried twice"
    assert done[-1] == len(prompts)
    assert done == sorted(set(done)), "every batch is told once, when it has come through"


def test_an_answer_also_ends_with_the_end_token_given_for_its_prompt():
    model, prompts = with_untied_head(tiny_model("llama")), prompts_of([9] * 8)
    plain = batched(model, prompts, VOCABULARY, 12)
    unused = next(token for token in range(VOCABULARY) if not any(token in answer for answer in plain))
    ends = [answer[3] for answer in plain[:4]] + [unused] * 4
    found = generate(model, prompts, eos_id=unused, pad_id=PAD, max_new_tokens=12, budget=TokenBudget(1000), ends=ends)
    for answer, whole, end in zip(found, plain, ends, strict=True):
        assert answer.tokens == (whole[: whole.index(end)] if end in whole else whole)
        assert answer.ended == (end in whole)
    assert [answer.ended for answer in found] == [True] * 4 + [False] * 4


def test_progress_counts_every_prompt_once():
    seen = []
    generate(
        tiny_model("llama").eval(),
        prompts_of([4, 70, 9, 6]),
        eos_id=2,
        pad_id=PAD,
        max_new_tokens=3,
        budget=TokenBudget(10),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_loss_is_the_mean_over_examples_of_plain_cross_entropy(architecture, sequences):
    model, found = adapted_model(architecture).eval(), sequences(7)
    expected = [by_hand(model, example) for example in found]
    for tokens_per_pass in (1, 40, 1000):
        loss = mean_loss(model, found, pad_id=PAD, tokens_per_pass=tokens_per_pass)
        assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def by_hand(model, example):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids.tolist()])).logits[0]
    targets = torch.tensor(example.input_ids[example.loss_start :].tolist())
    return float(functional.cross_entropy(logits[example.loss_start - 1 : -1], targets))


def test_an_example_whose_response_was_cut_away_does_not_count_in_the_loss(sequences):
    model = tiny_model("llama").eval()
    whole, cut = sequences(2), EncodedExample((5, 6, 7), 3)
    assert mean_loss(model, [*whole, cut], pad_id=PAD, tokens_per_pass=100) == mean_loss(model, whole, pad_id=PAD, tokens_per_pass=100)
    assert math.isnan(mean_loss(model, [cut], pad_id=PAD, tokens_per_pass=100))


@pytest.fixture(scope="module")
def embedded():
    return load_model(ModelConfig())


@pytest.fixture(scope="module")
def questions():
    return [*examples(Family.commonsense, "test", 6, 0), *examples(Family.arithmetic, "test", 6, 0)]


def test_accuracy_and_loss_are_those_of_single_questions(embedded, questions):
    model, tokenizer = embedded
    result = evaluate(model, tokenizer, questions, EvaluationConfig(max_new_tokens=24), DataConfig())
    correct, cut_off, losses = 0, 0, []
    for question in questions:
        prompt = tokenizer(question.prompt)["input_ids"]
        answer = one_by_one(model, [prompt], tokenizer.eos_token_id, 24)[0]
        ended = len(answer) < 24
        correct += is_correct(tokenizer.decode(answer, skip_special_tokens=True), question, ended=ended)
        cut_off += not ended
        response = tokenizer(question.response, add_special_tokens=False)["input_ids"]
        losses.append(by_hand(model, EncodedExample((*prompt, *response, tokenizer.eos_token_id), len(prompt))))
    assert (result.accuracy, result.num_examples, result.num_cut_off) == (correct / 12, 12, cut_off)
    assert result.loss == pytest.approx(sum(losses) / 12, rel=1e-5)


@pytest.fixture(scope="module")
def answered(embedded):
    """A question with the answer that the embedded model gives."""
    model, tokenizer = embedded
    asked = Example("sum", Family.arithmetic, "Tom has 5 apples . Tom gets 3 more . Now Tom has", "5 + 3 = 8", "")
    prompt = tokenizer(asked.prompt)["input_ids"]
    text = tokenizer.decode(one_by_one(model, [prompt], tokenizer.eos_token_id, 48)[0], skip_special_tokens=True)
    gold = extract(text, asked)
    assert gold is not None
    return replace(asked, answer=gold)


def test_accuracy_is_the_share_of_answers_that_equal_the_gold_one(embedded, answered):
    config, wrong = EvaluationConfig(max_new_tokens=48), replace(answered, answer=answered.answer + "1")
    assert evaluate(*embedded, [answered], config, DataConfig()).accuracy == 1
    assert evaluate(*embedded, [answered, wrong, wrong, wrong], config, DataConfig()).accuracy == 0.25


def test_the_number_at_which_an_answer_is_cut_off_does_not_count(embedded, answered):
    passed = replace(answered, answer="18")  # "18 apples . How many apples" are its first tokens
    found = evaluate(*embedded, [passed], EvaluationConfig(max_new_tokens=8), DataConfig())
    assert (found.accuracy, found.num_cut_off) == (0, 1)
    assert evaluate(*embedded, [answered], EvaluationConfig(max_new_tokens=48), DataConfig()).num_cut_off == 0


def test_a_free_text_answer_stops_at_twice_the_length_of_the_longest_reference(embedded, answered):
    model, tokenizer = embedded
    prompt = tokenizer(answered.prompt)["input_ids"]
    text = tokenizer.decode(one_by_one(model, [prompt], tokenizer.eos_token_id, 48)[0], skip_special_tokens=True)
    right, wrong = (replace(answered, family=Family.text, response=each, answer=each) for each in (text, "7"))
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    both = evaluate(model, tokenizer, [right, wrong], EvaluationConfig(max_new_tokens=48), DataConfig())
    assert (both.accuracy, both.num_cut_off) == (0.5, 0)
    calls.clear()
    short = evaluate(model, tokenizer, [wrong], EvaluationConfig(max_new_tokens=48), DataConfig())
    handle.remove()
    assert (short.accuracy, short.num_cut_off) == (0, 0)
    assert len(calls) == 2 * len(tokenizer("7", add_special_tokens=False)["input_ids"]) + 1 + 1  # its end, and the pass for the loss
    narrow = evaluate(model, tokenizer, [right], EvaluationConfig(max_new_tokens=48), DataConfig(max_length=len(prompt) + 1))
    assert narrow.accuracy == 1, "what is cut from a training example is not cut from the answer"
    asked = EvaluationConfig(max_new_tokens=4)
    assert evaluate(model, tokenizer, [right], asked, DataConfig()).num_cut_off == 1


def test_the_order_of_the_examples_and_the_size_of_the_batches_do_not_matter(embedded, questions):
    model, tokenizer = embedded
    few = EvaluationConfig(max_new_tokens=8, tokens_per_pass=200)
    found = evaluate(model, tokenizer, questions[::-1], few, DataConfig())
    expected = evaluate(model, tokenizer, questions, EvaluationConfig(max_new_tokens=8), DataConfig())
    assert found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_evaluation_leaves_the_model_unchanged(embedded, questions):
    model, tokenizer = embedded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        evaluate(model, tokenizer, questions[:2], EvaluationConfig(max_new_tokens=2), DataConfig())
        assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_training_mode_with_checkpointed_activations_answers_the_same(embedded, answered):
    model, tokenizer = load_model(ModelConfig(), activation_checkpointing=True)
    assert model.training
    config = EvaluationConfig(max_new_tokens=48)
    assert evaluate(model, tokenizer, [answered], config, DataConfig()) == evaluate(*embedded, [answered], config, DataConfig())
    assert evaluate(*embedded, [answered], config, DataConfig()).accuracy == 1

"""Pairs whose texts are encoded separately, against the bare encoder applied by hand, one text at a time."""

import json

import pytest
import torch
from conftest import KINDS, LABELS, adapted_classifier, own_leaves, save_classifier, tiny_classifier, train_pairs
from safetensors.torch import load_file
from torch.nn import functional

from fedsim.choices import Optimizer, PairReading, Schedule
from fedsim.cli.compose import compose
from fedsim.config import DataConfig, EvaluationConfig, ModelConfig
from fedsim.core.adapters import factors
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.heads import head_layers
from fedsim.core.payload import Layout
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.export import peft_files
from fedsim.models import load_model
from fedsim.seeding import NoiseKey
from fedsim.training.batches import collate
from fedsim.training.cohort import ClientData
from fedsim.training.evaluation import evaluate
from fedsim.training.labelled import encode_labelled
from fedsim.training.loss import batch_loss, group_gradients
from fedsim.training.private import PrivateRule
from fedsim.types import EncodedLabelled, Labelled

KEY = NoiseKey.of_seed(0)

CPU = torch.device("cpu")
WORDS = Labelled("sick", "w0 w1 w2 w3 w4", "w5", "contradiction", LABELS)


def logits_by_hand(encoder, head, texts):
    """Sentence-BERT's classification, one text at a time and without padding; `head` takes [3 * width]."""
    u, v = (functional.normalize(encoder(input_ids=torch.tensor([text.tolist()])).last_hidden_state[0].mean(0), dim=0) for text in texts)
    return head(torch.cat([u, v, (u - v).abs()]))


def loss_by_hand(model, pair):
    texts = pair.input_ids[: pair.split], pair.input_ids[pair.split :]
    return functional.cross_entropy(logits_by_hand(model.bert, model.classifier, texts), torch.tensor(pair.label))


def test_a_rows_loss_in_a_batch_equals_that_of_its_texts_encoded_one_by_one(pairs):
    model, rows = adapted_classifier("apart"), pairs(6, apart=True)
    assert len({pair.num_tokens for pair in rows}) > 1, "rows of one length would not show the padding"
    with torch.no_grad():
        expected = torch.stack([loss_by_hand(model, pair) for pair in rows])
        torch.testing.assert_close(batch_loss(model, collate(rows, 0, CPU))[1], expected, rtol=1e-5, atol=1e-6)


def test_a_cohort_equals_clients_trained_one_by_one(pairs):
    model, clients = adapted_classifier("apart"), [ClientData(i, pairs(n, seed=i, apart=True)) for i, n in enumerate((5, 3, 9))]
    for together, client in zip(train_pairs(model, clients), clients, strict=True):
        (alone,) = train_pairs(model, [client])
        torch.testing.assert_close(together.factors, alone.factors, rtol=1e-5, atol=2e-6)


def gradients_by_hand(model, rows):
    """Returns [{name: gradient} of each row], by autograd through the bare encoder."""
    leaves = own_leaves(model)
    return [dict(zip(leaves, torch.autograd.grad(loss_by_hand(model, pair), list(leaves.values())), strict=True)) for pair in rows]


def test_the_gradient_of_an_example_covers_both_its_texts(pairs):
    model, rows = adapted_classifier("apart"), pairs(5, apart=True)
    stacked = {name: tensor.expand(len(rows), *tensor.shape) for name, tensor in factors(model, KINDS).items()}
    _, found = group_gradients(model, stacked, collate(rows, 0, CPU), torch.ones(len(rows)))
    for row, expected in enumerate(gradients_by_hand(model, rows)):
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-6)


def test_a_private_step_clips_each_example_over_both_its_texts(pairs):
    model, rows, clip = adapted_classifier("apart"), pairs(4, apart=True), 0.05
    layout = Layout.of(factors(model, KINDS))
    start = layout.pack(factors(model, KINDS))
    everything = {"batch_size": 100, "local_steps": 1, "learning_rate": 1.0, "warmup_ratio": 0.0}
    rule = {"optimizer": Optimizer.sgd, "schedule": Schedule.constant}
    (found,) = train_pairs(model, [ClientData(0, rows)], PrivateRule(clip, (0.0,), KEY), **everything, **rule)
    each = torch.stack([layout.pack(gradient) for gradient in gradients_by_hand(model, rows)])
    norms = each.norm(dim=1, keepdim=True)
    assert norms.min() > clip
    torch.testing.assert_close(found.factors, start - (each * clip / norms).sum(0) / len(rows), rtol=1e-4, atol=1e-6)


def test_each_text_is_its_own_sequence_of_at_most_half_the_length(tmp_path):
    _, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu"), LABELS)
    (whole,), (cut,) = (encode_labelled([WORDS], tokenizer, length, apart=True) for length in (64, 8))
    assert whole == EncodedLabelled((1, 4, 5, 6, 7, 8, 2, 1, 9, 2), (), label=2, split=7)
    assert cut == EncodedLabelled((1, 4, 5, 2, 1, 9, 2), (), label=2, split=4)


def test_the_evaluation_loss_equals_that_of_the_bare_encoder(tmp_path):
    model, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu", pairs=PairReading.apart), LABELS)
    assert isinstance(model, BiEncoder)
    examples = [Labelled("sick", f"w{i} w{i + 1}", " ".join(["w3"] * (1 + i % 4)), LABELS[i % 3], LABELS) for i in range(12)]
    with torch.no_grad():
        expected = torch.stack([loss_by_hand(model, pair) for pair in encode_labelled(examples, tokenizer, 64, apart=True)])
    for tokens in (15, 10_000):
        found = evaluate(model, tokenizer, examples, EvaluationConfig(tokens_per_pass=tokens), DataConfig())
        assert found.loss == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_adapter_onto_the_encoder_and_the_head_is_a_separate_file(pairs, tmp_path):
    from peft import PeftModel

    model, rows = adapted_classifier("apart"), pairs(3, apart=True)
    for name, content in peft_files(model, "base").items():
        (tmp_path / name).write_bytes(content)
    assert json.loads((tmp_path / "adapter_config.json").read_bytes())["task_type"] == "FEATURE_EXTRACTION"
    loaded, head = PeftModel.from_pretrained(tiny_classifier().bert, str(tmp_path)), load_file(tmp_path / "head.safetensors")
    (own,) = head_layers(model).values()
    for pair in rows:
        texts = pair.input_ids[: pair.split], pair.input_ids[pair.split :]
        with torch.no_grad():
            expected = logits_by_hand(model.bert, own, texts)
            found = logits_by_hand(loaded, lambda x: functional.linear(x, head["weight"], head["bias"]), texts)
            bare = logits_by_hand(tiny_classifier().bert, own, texts)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        assert (bare - expected).abs().max() > 1e-2, "the head alone would make a difference"


def test_pairs_apart_is_refused_for_data_that_is_not_classified():
    with pytest.raises(UserError, match=r"model.pairs=apart: .* data=embedded is answered; choose data=snli"):
        effective(compose(["model.pairs=apart"]))

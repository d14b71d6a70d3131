import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedsim.core import head_loss
from fedsim.core.adapters import adapt, bound, factors
from fedsim.core.forms import LORA_SB
from fedsim.core.initialization import from_seed
from fedsim.training import loss
from fedsim.training.batches import collate
from fedsim.training.loss import batch_loss, group_gradients
from fedsim.types import EncodedExample

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ROWS = [
    ([3, 4, 5, 6, 7, 8], 3),
    ([9, 10, 11], 1),
    ([5, 5, 4, 7, 12], 4),
    ([1, 2], 2),
]  # tokens, and where the loss starts; none in the last
WEIGHTS = torch.tensor([1.0, 0.3, 1 / 7, 2.0])


def adapted_model(kind="llama", targets=(), **others):
    """Returns a small model with an adapter of random factors."""
    settings = CONFIG_MAPPING[kind](**SIZES, vocab_size=30, pad_token_id=0, eos_token_id=1, **others)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").requires_grad_(False).eval()
    spec = adapt(model, LORA_SB, 4, 1, 1.0, list(targets))
    drawn = from_seed(spec, {}, 1)
    with torch.no_grad():
        for name, factor in factors(model, spec.kinds).items():
            factor.copy_(drawn[name] if name in drawn else torch.zeros_like(factor))
            if name.endswith(".R"):
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) / 2)
    return model


def batch(rows=ROWS):
    return collate([EncodedExample(tuple(tokens), start) for tokens, start in rows], 0, torch.device("cpu"))


def by_definition(model):
    """Returns the losses and the gradients of their weighted sum, from the logits of every row alone."""
    leaves = {name: factor.clone().requires_grad_() for name, factor in factors(model, ("R",)).items()}
    losses = []
    with bound(model, leaves):
        for tokens, start in ROWS:
            logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
            targets = range(start, len(tokens))
            each = [functional.log_softmax(logits[i - 1], -1)[tokens[i]] for i in targets]
            losses.append(-torch.stack(each).mean() if each else torch.zeros(()))
        total = (torch.stack(losses) * WEIGHTS).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
    return torch.stack(losses).detach(), dict(zip(leaves, gradients, strict=True))


def in_a_pass(model):
    return group_gradients(model, {name: factor.unsqueeze(0) for name, factor in factors(model, ("R",)).items()}, batch(), WEIGHTS)


MODELS = {
    "a head at the end": ("llama", {}, True),
    "a head that shares the embedding": ("llama", {"tie_word_embeddings": True}, True),
    "logits that are scaled": ("granite", {"logits_scaling": 3.0}, False),
    "a head with an adapter": ("llama", {"targets": ["lm_head", "q_proj"]}, False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("logits_at_once", [10_000, 3], ids=["together", "three tokens at a time"])
def test_losses_and_gradients_match_the_definition(name, logits_at_once, monkeypatch):
    kind, others, skips_head = MODELS[name]
    model = adapted_model(kind, **others)
    monkeypatch.setattr(head_loss, "LOGIT_BYTES", 4 * 30 * logits_at_once)

    for _ in range(2):  # the first pass finds out whether the head is the last layer
        losses, gradients = in_a_pass(model)

        expected, expected_gradients = by_definition(model)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        for layer, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[layer].squeeze(0), gradient, rtol=1e-4, atol=1e-6)
    assert (loss._head_inputs(model, batch())[1] is not None) == skips_head


def test_a_loss_in_one_piece_equals_that_of_the_whole_logits_bit_for_bit():
    model = adapted_model()
    losses, gradients = in_a_pass(model)
    model.get_output_embeddings().is_last = False

    whole, of_whole = in_a_pass(model)

    assert torch.equal(losses, whole)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in of_whole.items())


def test_no_more_logits_exist_at_once_than_allowed(monkeypatch):
    model, seen = adapted_model(), []
    monkeypatch.setattr(head_loss, "LOGIT_BYTES", 4 * 30 * 4)
    whole = head_loss.cross_entropy
    monkeypatch.setattr(head_loss, "cross_entropy", lambda logits, labels: seen.append(logits.numel()) or whole(logits, labels))

    in_a_pass(model)

    assert max(seen) == 4 * 30
    assert sum(seen) == 30 * sum(len(tokens) - start for tokens, start in ROWS), "of tokens without a loss there are none"


@pytest.mark.parametrize(("vocabulary", "tokens"), [(128_256, 512), (256_000, 256), (151_936, 384), (2_000_000, 33), (1 << 30, 1)])
def test_logits_are_computed_for_whole_tiles_of_tokens_at_once(vocabulary, tokens):
    assert head_loss.tokens_at_once(vocabulary) == tokens
    assert 4 * vocabulary * tokens <= max(head_loss.LOGIT_BYTES, 4 * vocabulary)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("per_example", [False, True])
def test_the_head_is_found_to_be_last_for_any_grouping_of_the_rows(groups, per_example):
    model = adapted_model()
    stacked = {name: factor.expand(groups, *factor.shape) for name, factor in factors(model, ("R",)).items()}

    group_gradients(model, stacked, batch(), WEIGHTS, per_example=per_example)

    assert model.get_output_embeddings().is_last


def test_a_model_that_changes_its_logits_after_the_head_gets_the_loss_of_the_changed_logits():
    model = adapted_model()
    inner = model.forward

    def biased(*args, **options):
        result = inner(*args, **options)
        result.logits = result.logits + torch.arange(30.0)  # does not fit the inputs of the head
        return result

    model.forward = biased

    losses, _ = in_a_pass(model)

    torch.testing.assert_close(losses, by_definition(model)[0], rtol=1e-5, atol=1e-6)


def test_losses_without_gradients_are_the_same():
    model = adapted_model()
    with torch.no_grad():
        total, losses = batch_loss(model, batch(), WEIGHTS)

    torch.testing.assert_close(losses, in_a_pass(model)[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total, (losses * WEIGHTS).sum())
    assert not total.requires_grad


def test_a_pass_without_any_loss_has_gradients_of_zero():
    model = adapted_model()
    leaves = {name: factor.unsqueeze(0) for name, factor in factors(model, ("R",)).items()}

    losses, gradients = group_gradients(model, leaves, batch([([1, 2], 2), ([3, 4, 5], 3)]), torch.ones(2))

    assert losses.tolist() == [0.0, 0.0]
    assert all(not gradient.any() for gradient in gradients.values())

"""The estimated memory of a pass against the tensors that autograd keeps; its peak is measured in tests/test_second_device.py."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CLASSIFIERS, LABELS, VOCABULARY, adapted_model, tiny_classifier, tiny_model

from fedsim.core import head_loss
from fedsim.core.adapters import adapt, factors
from fedsim.core.forms import DENSE, HEAD, LORA, LORA_SB, RAVAN
from fedsim.core.head_loss import LOGIT_COPIES
from fedsim.core.memory import kept_bytes, pass_bytes, shape_of
from fedsim.models import head_paths
from fedsim.training.batches import collate
from fedsim.training.loss import group_gradients
from fedsim.types import EncodedExample, EncodedLabelled

ROWS, LENGTH = 8, 32
TRAINED = [(LORA_SB, ("R",)), (LORA, ("B", "A")), (LORA, ("B",)), (DENSE, ("D",)), (RAVAN, ("H", "s"))]


def texts():
    """Rows of one length, with the loss on every token."""
    return [EncodedExample(tuple(range(3, 3 + LENGTH)), 1) for _ in range(ROWS)]


def pairs(*, apart):
    """As many tokens in pairs; where texts are read apart, in half as many pairs of two texts of that length."""
    ids = np.arange(LENGTH * (2 if apart else 1), dtype=np.int32) % VOCABULARY
    return [EncodedLabelled(ids, (), row % len(LABELS), LENGTH if apart else 0) for row in range(ROWS // (2 if apart else 1))]


def kept_by_autograd(model, kinds, examples, *, groups=2, per_example=False):
    """Bytes that the forward pass of the blocks keeps for the backward pass, each storage once, without weights and factors."""
    stacked = {name: factor.expand(groups, *factor.shape).clone() for name, factor in factors(model, kinds).items()}
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *stacked.values())}
    kept, inside = {}, []
    for block in max((part for part in model.modules() if isinstance(part, torch.nn.ModuleList)), key=len):
        block.register_forward_pre_hook(lambda *_: inside.append(True))
        block.register_forward_hook(lambda *_: inside.clear())

    def record(tensor):
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        batch = collate(examples, 0, torch.device("cpu"))
        group_gradients(model, stacked, batch, torch.ones(len(examples)), per_example=per_example)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("form", "kinds"), TRAINED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_keeps_as_many_bytes_as_estimated(architecture, form, kinds):
    model = tiny_model(architecture)
    spec = adapt(model, form, 4, 2, 1.0, [])
    kept = kept_by_autograd(model, kinds, texts())
    assert 0.96 * kept < kept_bytes(shape_of(model), spec, kinds, ROWS * LENGTH, length=LENGTH, groups=2) < 1.08 * kept


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("form", "kinds"), TRAINED[:2])
@pytest.mark.parametrize("architecture", [*CLASSIFIERS, "apart"])
def test_an_encoder_keeps_as_many_bytes_as_estimated(architecture, form, kinds, attention):
    model = tiny_classifier(architecture)
    getattr(model, model.base_model_prefix).set_attn_implementation(attention)
    spec = adapt(model, form, 4, 1, 1.0, [], head_paths(model))
    kept = kept_by_autograd(model, (*kinds, HEAD), pairs(apart=architecture == "apart"))
    assert 0.96 * kept < kept_bytes(shape_of(model), spec, kinds, ROWS * LENGTH, length=LENGTH, groups=2) < 1.08 * kept


def test_gradients_of_examples_keep_as_many_bytes_as_those_of_groups():
    of_groups, of_examples = (kept_by_autograd(adapted_model(), ("R",), texts(), per_example=each) for each in (False, True))
    assert of_groups == of_examples


def test_fewer_layers_with_adapters_keep_fewer_bytes():
    kept = []
    for targets in (["q_proj", "v_proj"], []):
        model = tiny_model("llama")
        spec = adapt(model, LORA, 4, 1, 1.0, targets)
        kept.append(kept_by_autograd(model, ("B", "A"), texts()))
        assert 0.96 * kept[-1] < kept_bytes(shape_of(model), spec, ("B", "A"), ROWS * LENGTH, length=LENGTH) < 1.08 * kept[-1]
    assert kept[0] < kept[1]


def test_adapting_a_model_does_not_change_its_shape():
    model = tiny_model("llama")
    bare = shape_of(model)
    adapt(model, LORA_SB, 4, 1, 1.0, [])
    assert shape_of(model) == bare
    assert shape_of(model, 2).block_bytes(LENGTH) == bare.block_bytes(LENGTH) / 2


def test_logits_are_counted_in_parts_only_where_the_loss_computes_them_in_parts(monkeypatch):
    monkeypatch.setattr(head_loss, "LOGIT_BYTES", 1000)
    last, scaled, adapted = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    scaled.config.logit_scale = 2.0
    adapted.lm_head.weight = torch.nn.Parameter(adapted.lm_head.weight.clone())  # no longer the embedding's
    spec = adapt(adapted, LORA_SB, 2, 1, 1.0, ["lm_head"])
    of_last, of_scaled, of_adapted = (pass_bytes(shape_of(each), spec, ("R",), 1000, length=10) for each in (last, scaled, adapted))
    logits = (LOGIT_COPIES + 1) * 4 * 1000 * VOCABULARY
    assert of_scaled == kept_bytes(shape_of(scaled), spec, ("R",), 1000, length=10) + 3 * 4 * 1000 * 32 + logits
    assert of_last < of_scaled == of_adapted

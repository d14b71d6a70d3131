import json

import pytest
import torch
from conftest import ARCHITECTURES, CLASSIFIERS, adapted_classifier, adapted_model, tiny_classifier, tiny_model

from fedsim.core.adapters import adapted_layers, matrix_shape
from fedsim.export import peft_files


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT uses a name that transformers is retiring
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_the_adapter_and_gives_the_same_logits(architecture, tmp_path):
    from peft import PeftModel

    model = adapted_model(architecture)
    for name, content in peft_files(model, "base").items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path))
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-5, atol=2e-6)


def test_the_export_contains_only_lora_a_and_lora_b():
    from safetensors.torch import load

    names = load(peft_files(adapted_model(), "base")["adapter_model.safetensors"])
    assert {name.rsplit(".", 2)[-2] for name in names} == {"lora_A", "lora_B"}


def test_the_configuration_names_the_base_model():
    assert json.loads(peft_files(adapted_model(), "owner/model")["adapter_config.json"])["base_model_name_or_path"] == "owner/model"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_peft_loads_an_adapter_with_its_classification_head_and_gives_the_same_logits(architecture, tmp_path):
    from peft import PeftModel

    model = adapted_classifier(architecture)
    for name, content in peft_files(model, "base").items():
        (tmp_path / name).write_bytes(content)
    bare = tiny_classifier(architecture)
    loaded = PeftModel.from_pretrained(bare, str(tmp_path))
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-5, atol=2e-6)
        assert (tiny_classifier(architecture)(input_ids=ids).logits - expected).abs().max() > 0.1, "the head alone would make a difference"


def test_an_adapter_of_a_causal_model_has_no_modules_to_save():
    assert "modules_to_save" not in json.loads(peft_files(adapted_model(), "base")["adapter_config.json"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_updates_are_exported_at_their_own_rank(dtype):
    from safetensors.torch import load

    model, generator = adapted_model(rank=4).to(dtype), torch.Generator().manual_seed(0)
    expected = {}
    for name, layer in adapted_layers(model).items():
        for kind in layer.shapes:
            layer._buffers[kind] = layer._buffers[kind].float()
        rows, columns = matrix_shape(layer.base)
        folded = 1e-4 * torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
        layer.fold(folded)
        expected[name] = layer.update() + folded
    tensors = load(peft_files(model, "base")["adapter_model.safetensors"])
    for name, change in expected.items():
        left, right = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
        assert left.shape[1] == 7, "4 of the adapter and 3 of the fold"
        torch.testing.assert_close(left @ right, change, rtol=1e-4, atol=1e-7)

import json

import pytest
import torch
from conftest import ARCHITECTURES, adapted_model, tiny_model

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


def test_no_third_matrix_is_shipped():
    from safetensors.torch import load

    names = load(peft_files(adapted_model(), "base")["adapter_model.safetensors"])
    assert {name.rsplit(".", 2)[-2] for name in names} == {"lora_A", "lora_B"}


def test_the_configuration_names_the_base_model():
    assert json.loads(peft_files(adapted_model(), "owner/model")["adapter_config.json"])["base_model_name_or_path"] == "owner/model"

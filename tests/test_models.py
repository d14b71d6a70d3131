import json
import logging

import pytest
import torch
from conftest import ARCHITECTURES, LABELS, save_classifier, tiny_classifier, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, OPTConfig, PreTrainedTokenizerFast, XGLMConfig

from fedsim.choices import Dtype
from fedsim.config import ModelConfig
from fedsim.errors import UserError
from fedsim.models import head_paths, load_model, prepare, source

FUNCTIONAL_DROPOUT = (
    OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, dropout=0.5),
    XGLMConfig(vocab_size=50, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.5, layerdrop=0.5),
    FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.5, attention_dropout=0.5),
    BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.5, attention_dropout=0.5),
)


def save(folder, architecture="llama", *, eos="</s>", **changes):
    """Writes a tiny model and a tokenizer as a user would have them on disk; `changes` go into config.json."""
    tiny_model(architecture).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return ModelConfig(path=str(folder), device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_frozen_and_without_dropout(architecture, tmp_path):
    model, tokenizer = load_model(save(tmp_path, architecture))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("settings", FUNCTIONAL_DROPOUT, ids=lambda settings: settings.model_type)
def test_functional_dropout_is_off_too_with_activation_checkpointing(settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(settings)
    ids = torch.arange(1, 13)[None]
    fresh.train()
    assert not torch.equal(fresh(ids).logits, fresh(ids).logits), "in training mode the model drops out"
    model = prepare(fresh, torch.device("cpu"), activation_checkpointing=True)
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_base_can_be_loaded_in_bfloat16(tmp_path):
    config = save(tmp_path)
    config.dtype = Dtype.bfloat16
    assert {p.dtype for p in load_model(config)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bert", "is_decoder": False}, "reads both ways"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "decoder-only"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "unquantised"),
        ({"model_type": "no-such-model"}, "cannot be loaded"),
    ],
)
def test_an_unsuitable_model_is_refused_in_one_line(changes, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as caught:
        load_model(save(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_path_to_a_missing_folder_is_refused():
    with pytest.raises(UserError, match=r"expected a folder with config.json, or the id of a model"):
        load_model(ModelConfig(path="./no/such/folder"))


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path):
    with pytest.raises(UserError, match="end-of-sequence"):
        load_model(save(tmp_path, eos=None))


def test_a_broken_weight_file_is_refused_in_one_line(tmp_path):
    config = save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off .*copy or download it again") as caught:
        load_model(config)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_reported_once_with_what_to_do(monkeypatch, caplog):
    def unreachable(path):
        for attempt in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying %s", attempt)
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"connect to the hub\. Without network, download the model elsewhere"):
        load_model(ModelConfig(path="nobody/nothing"))
    assert caplog.records == []


def test_a_folder_without_a_tokenizer_is_reported(tmp_path):
    config = save(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer, such as tokenizer\.json"):
        load_model(config)


def test_a_model_with_missing_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    config = save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights .* 'model.layers.1.mlp.up_proj.weight'"):
        load_model(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_device_is_refused(tmp_path):
    config = save(tmp_path)
    config.device = "cuda"
    with pytest.raises(UserError, match=r"model.device=cpu"):
        load_model(config)


def test_an_encoder_may_lack_its_classification_head_but_no_other_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    config = ModelConfig(path=save_classifier(tmp_path), device="cpu")
    model, tokenizer = load_model(config, LABELS)
    assert head_paths(model) == ["classifier"]
    assert model.classifier.out_features == 3
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.model_max_length == 64
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "pooler" not in name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"2 weights of the 'bert' architecture are missing, first 'bert.pooler.dense.bias'"):
        load_model(config, LABELS)


def test_a_head_for_other_labels_is_replaced(tmp_path):
    path = save_classifier(tmp_path)
    tiny_classifier().save_pretrained(path)
    assert load_model(ModelConfig(path=path, device="cpu"), ("yes", "no"))[0].classifier.out_features == 2


@pytest.mark.parametrize(
    ("architecture", "paths"), [("roberta", ["classifier.dense", "classifier.out_proj"]), ("distilbert", ["pre_classifier", "classifier"])]
)
def test_a_head_is_every_linear_layer_outside_the_body(architecture, paths):
    assert head_paths(tiny_classifier(architecture)) == paths


def test_an_encoder_is_refused_for_generation_and_a_decoder_for_classification(tmp_path):
    path = save_classifier(tmp_path / "encoder")
    with pytest.raises(UserError, match="reads both ways and cannot generate answers; choose data that is classified"):
        load_model(ModelConfig(path=path, device="cpu"))
    (tmp_path / "decoder").mkdir()
    with pytest.raises(UserError, match=r"takes an encoder of the kinds bert, distilbert, roberta, got 'llama'; choose model=bert_base"):
        load_model(save(tmp_path / "decoder"), LABELS)


def test_a_model_in_a_package_is_found_by_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "a_package_with_a_model"
    save_classifier(folder / "model")
    (folder / "__init__.py").write_text("raise RuntimeError('the package is not to be run')")
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(path="package:a_package_with_a_model", device="cpu")
    assert source(config) == str(folder / "model")
    load_model(config, LABELS)


def test_a_package_that_is_missing_or_holds_no_model_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"the package 'no_such_package' is not installed; install it, .* pip install -e '.\[nli\]'"):
        load_model(ModelConfig(path="package:no_such_package"), LABELS)
    with pytest.raises(UserError, match=r"expected a folder with config.json in the package 'yaml', found none"):
        load_model(ModelConfig(path="package:yaml"), LABELS)
    with pytest.raises(UserError, match="is not installed"):
        load_model(ModelConfig(path="package:no/such.name"), LABELS)

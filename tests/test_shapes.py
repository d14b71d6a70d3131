import json
import math
import socket
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, LABELS, save_classifier, tiny_model

from fedsim.cli.compose import compose
from fedsim.cli.groups import groups
from fedsim.cli.overrides import parse
from fedsim.config import Config, ModelConfig
from fedsim.config_check import check
from fedsim.core.adapters import adapt
from fedsim.core.forms import LORA_SB
from fedsim.core.memory import shape_of
from fedsim.errors import UserError
from fedsim.models import load_model
from fedsim.plain import from_dict, to_dict
from fedsim.shapes import layer_shapes, model_shape, num_parameters, random_model, skeleton

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 50,
}

PUBLISHED = {
    "mistral_7b": 7_241_732_096,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama31_70b": 70_553_706_496,
    "gemma2_9b": 9_241_705_984,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "bert_base": 108_310_272,
    "minilm": 22_713_216,
    "roberta_large": 355_359_744,
    "gpt2": 124_439_808,
}
"""Numbers of parameters of the checkpoints, as their model cards and their files give them."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach a hub fails the test."""

    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def model(choice):
    """The model of a file in conf/model."""
    return compose([f"model={choice}"]).model


@pytest.mark.parametrize("choice", PUBLISHED)
def test_every_model_has_its_published_number_of_parameters(choice):
    assert num_parameters(model(choice)) == PUBLISHED[choice]


def test_every_model_in_conf_is_covered_here():
    assert set(groups()["model"]) == {*PUBLISHED, "embedded", "local"}


def test_the_embedded_model_has_the_shapes_of_the_loaded_and_adapted_one():
    loaded, _ = load_model(ModelConfig(device="cpu"))
    total = sum(p.numel() for p in loaded.parameters())
    adapted = adapt(loaded, LORA_SB, 4, 1, 1.0, []).layers
    assert list(layer_shapes(ModelConfig(), []).items()) == list(adapted.items())
    assert num_parameters(ModelConfig()) == total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_folder_has_the_shapes_of_its_model(architecture, tmp_path):
    real = tiny_model(architecture)
    real.config.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), architecture=TINY)  # the folder takes precedence
    total = sum(p.numel() for p in real.parameters())
    assert num_parameters(config) == total
    assert list(layer_shapes(config, []).items()) == list(adapt(real, LORA_SB, 4, 1, 1.0, []).layers.items())


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("pairs", ["together", "apart"])
def test_an_encoder_with_random_weights_has_the_structure_of_the_loaded_one(pairs, texts, tmp_path):
    config = compose(["model=local", f"model.path={save_classifier(tmp_path)}", f"model.pairs={pairs}", "model.device=cpu"]).model
    loaded, _ = load_model(config, LABELS, texts)
    made = random_model(config, torch.device("cpu"), LABELS, texts)
    assert str(made) == str(loaded)
    expected = [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in loaded.named_parameters()]
    assert [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in made.named_parameters()] == expected
    assert made.config._attn_implementation == loaded.config._attn_implementation
    assert model_shape(config, LABELS, texts) == shape_of(loaded)


def test_architecture_entries_equal_config_json(tmp_path):
    config = model("qwen25_0_5b")
    (tmp_path / "config.json").write_text(json.dumps(config.architecture))
    assert layer_shapes(config, []) == layer_shapes(ModelConfig(path=str(tmp_path)), [])


def test_the_seven_layers_of_mistral_have_the_parameter_counts_of_the_paper():
    shapes = layer_shapes(model("mistral_7b"), SEVEN)
    assert shapes == layer_shapes(model("mistral_7b"), [])
    assert len(shapes) == 7 * 32
    assert sum(32 * (m + n) for m, n in shapes.values()) == 83_886_080  # LoRA, r = 32
    assert sum(32 * m for m, _ in shapes.values()) == 44_040_192  # FFA-LoRA: B alone, 44.0 M
    fed_sb = [round(rank**2 * len(shapes) / 1e6, 2) for rank in (120, 160, 200)]
    assert fed_sb == [3.23, 5.73, 8.96]
    assert round(sum(200 * (m + n) for m, n in shapes.values()) / 1e6, 1) == 524.3  # bases, r = 200


def test_shapes_are_out_by_in_even_if_the_weight_is_stored_transposed():
    shapes = layer_shapes(model("gpt2"), [])
    first = {path.removeprefix("transformer.h.0."): shape for path, shape in shapes.items() if ".h.0." in path}
    expected = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
    assert first == expected
    assert len(shapes) == 4 * 12
    assert layer_shapes(model("llama32_1b"), ["k_proj"])["model.layers.0.self_attn.k_proj"] == (512, 2048)


def test_an_encoder_has_the_paths_of_the_bare_model():
    shapes = layer_shapes(model("bert_base"), ["query", "value"])
    assert len(shapes) == 2 * 12
    assert shapes["encoder.layer.0.attention.self.query"] == (768, 768)


def test_a_skeleton_holds_no_memory_and_touches_no_random_state():
    state = torch.get_rng_state()
    built = skeleton(model("mistral_7b"))
    assert {t.device.type for t in [*built.parameters(), *built.buffers()]} == {"meta"}
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() is torch.float32
    assert torch.zeros(1).device.type == "cpu"


def test_a_skeleton_is_built_once_per_model():
    tiny = skeleton(ModelConfig(architecture=TINY))
    assert skeleton(ModelConfig(architecture=dict(TINY))) is tiny
    assert skeleton(ModelConfig(architecture=TINY), ("no", "yes")) is not tiny
    wider = skeleton(ModelConfig(architecture=TINY | {"vocab_size": TINY["vocab_size"] + 8}))
    assert wider.config.vocab_size == TINY["vocab_size"] + 8


def test_shapes_of_seven_billion_parameters_take_less_than_two_seconds():
    skeleton(ModelConfig(architecture=TINY))  # does the imports
    mistral = model("mistral_7b")
    began = time.perf_counter()
    layer_shapes(mistral, SEVEN)
    assert time.perf_counter() - began < 2


def test_layer_shapes_print_nothing():
    words = "from fedsim.config import ModelConfig\nfrom fedsim.shapes import layer_shapes\n"
    odd = TINY | {"torch_dtype": "float16", "rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "odd": 1}, "bos_token_id": 99}
    for config in (ModelConfig(architecture=odd), model("bert_base"), model("gpt2")):
        words += f"layer_shapes(ModelConfig(architecture={config.architecture!r}), [])\n"
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", words], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_warnings_and_logging_are_restored():
    from transformers.utils import logging

    level, filters = logging.get_verbosity(), list(warnings.filters)
    num_parameters(ModelConfig(architecture=TINY))
    assert (logging.get_verbosity(), list(warnings.filters)) == (level, filters)


def test_the_entries_are_not_modified():
    entries = TINY | {"rope_parameters": {"rope_theta": 10.0}}
    before = json.dumps(entries)
    num_parameters(ModelConfig(architecture=entries))
    assert json.dumps(entries) == before


REFUSED = [
    ({"hidden_size": 64}, "Expected a model_type .* got None"),
    ({"model_type": "lama"}, "got 'lama'. Did you mean 'llama'"),
    ({"model_type": ["llama"]}, "Expected a model_type"),
    ({"model_type": "t5"}, "Expected a decoder-only language model or a text encoder, got 't5'"),
    ({"model_type": "vit"}, "got 'vit'"),
    (TINY | {"hidden_size": "wide"}, "expected int, got str"),
    (TINY | {"hidden_size": None}, "expected int, got NoneType"),
    (TINY | {"hidden_size": 65}, "not a multiple"),
    (TINY | {"hidden_size": -64}, "Expected entries that make a model"),
    (TINY | {"num_attention_heads": 0}, "Expected entries that make a model"),
    (TINY | {"num_hidden_layers": 0}, "repeated blocks, found none"),
]


@pytest.mark.parametrize(("entries", "line"), REFUSED)
@pytest.mark.parametrize("place", ["model.architecture", "config.json"])
def test_invalid_entries_are_reported_in_one_line(entries, line, place, tmp_path):
    config = ModelConfig(architecture=entries)
    if place == "config.json":
        (tmp_path / "config.json").write_text(json.dumps(entries))
        config = ModelConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=line) as caught:
        layer_shapes(config, [])
    assert "\n" not in str(caught.value)


def test_a_misspelt_entry_is_not_replaced_by_the_default():
    with pytest.raises(UserError, match=r"'hiden_size' is no entry of a llama model. Did you mean 'hidden_size'\?"):
        layer_shapes(ModelConfig(architecture={"model_type": "llama", "hiden_size": 64}), [])


def test_aliases_of_entries_and_undeclared_entries_are_accepted():
    config = ModelConfig(architecture={"model_type": "gpt2", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2})
    assert layer_shapes(config, ["c_fc"]) == {"transformer.h.0.mlp.c_fc": (96, 24)}
    config = ModelConfig(architecture=TINY | {"model_type": "qwen2", "head_dim": 8, "num_key_value_heads": 2})
    assert layer_shapes(config, ["k_proj"])["model.layers.1.self_attn.k_proj"] == (16, 64)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"null"])
def test_a_broken_config_json_is_refused_in_one_line_that_names_it(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        layer_shapes(ModelConfig(path=str(tmp_path), architecture=TINY), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["org/some-model", "./no/such/folder"])
def test_a_missing_model_asks_for_a_folder_or_the_architecture(path):
    with pytest.raises(UserError, match=r"local folder with config.json in model.path, or model.architecture, got model.path=") as caught:
        layer_shapes(ModelConfig(path=path), [])
    assert "\n" not in str(caught.value)


def test_a_name_that_matches_no_layer_is_refused():
    with pytest.raises(UserError, match="Did you mean 'q_proj'"):
        layer_shapes(model("mistral_7b"), ["qproj"])


def test_code_in_a_model_folder_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit(3)")
    remote = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(TINY | remote))
    assert num_parameters(ModelConfig(path=str(tmp_path))) == num_parameters(ModelConfig(architecture=TINY))


def test_an_architecture_on_the_command_line_is_added_to_that_of_the_choice():
    assert compose(["model.architecture={model_type:llama,hidden_size:64}"]).model.architecture == {
        "model_type": "llama",
        "hidden_size": 64,
    }
    short = compose(["model=llama32_1b", "model.architecture={num_hidden_layers:2}"])
    check(short)
    assert len(layer_shapes(short.model, ["q_proj"])) == 2
    assert compose(["model=llama32_1b"]).model.architecture["num_hidden_layers"] == 16


@pytest.mark.parametrize("value", ["5", "[a]", "null", "text"])
def test_an_architecture_that_is_not_a_mapping_is_refused(value):
    with pytest.raises(UserError, match=r"Expected model.architecture \(entries, such as \{a:1,b:2\}\)"):
        parse([f"model.architecture={value}"])


def test_an_architecture_survives_json():
    config = compose(["model=mistral_7b", "model.architecture={rope_parameters:{rope_theta:1e6,list:[1,null]}}"])
    again = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert type(again.model.architecture["rope_parameters"]) is dict
    assert math.isclose(again.model.architecture["rope_parameters"]["rope_theta"], 1e6)

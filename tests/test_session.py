"""Checks before a session is opened, and the base digest that server and client compare before training."""

import gc
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, refusal, save_classifier, tiny_model, write_sick
from tokenizers.normalizers import Lowercase

from fedsim import session as sessions
from fedsim.cli.compose import compose
from fedsim.config import ModelConfig
from fedsim.core.adapters import adapt, adapted_layers
from fedsim.core.forms import LORA_SB
from fedsim.errors import UserError
from fedsim.session import check, forget_session, open_session


@pytest.fixture
def session():
    yield open_session(compose(["data.train_examples=20", "federation.clients=2", "adapter.init=orthogonal", "adapter.rank=2"]))
    forget_session()  # the tests change it


def digest_now(session):
    session.__dict__.pop("base_digest", None)
    return session.base_digest


@contextmanager
def changed(tensor):
    with torch.no_grad():
        before = tensor.clone()
        tensor.view(-1)[0] += 1
        yield
        tensor.copy_(before)


def test_the_base_digest_covers_base_weights_and_tokenization(session):
    own = digest_now(session)
    with changed(session.model.get_input_embeddings().weight):
        assert digest_now(session) != own
    assert digest_now(session) == own
    session.tokenizer.chat_template = "{{ messages }}"
    assert digest_now(session) != own
    session.tokenizer.chat_template = None
    assert digest_now(session) == own
    backend = session.tokenizer.backend_tokenizer
    kept, backend.normalizer = backend.normalizer, Lowercase()
    assert digest_now(session) != own
    backend.normalizer = kept
    assert digest_now(session) == own
    session.tokenizer.add_tokens(["another word"])
    assert digest_now(session) != own


def test_the_base_digest_leaves_out_weights_into_which_updates_are_folded(session):
    own, layer = digest_now(session), next(iter(adapted_layers(session.model).values()))
    with changed(layer.base.weight):
        assert digest_now(session) == own


def test_the_last_model_is_released_before_the_next_one_is_loaded(monkeypatch):
    options = ("data.train_examples=20", "federation.clients=2", "adapter.init=orthogonal")
    last = weakref.ref(open_session(compose([*options, "seed=1"])).model)
    load, alive = sessions.load_model, []

    def watched(*args, **named):
        gc.collect()
        alive.append(last() is not None)
        return load(*args, **named)

    monkeypatch.setattr(sessions, "load_model", watched)
    assert open_session(compose([*options, "seed=2"])) is open_session(compose([*options, "seed=2"]))
    assert alive == [False]


FEW = ("data.train_examples=20", "data.test_examples=4", "federation.clients=2")
REFUSED = [
    (["adapter.rank=193"], "adapter.rank: expected at most 192"),
    (["method=ravan", "adapter.rank=49"], "got 49 x 4 heads"),
    (["method=ravan", "method.heads=193"], "method.heads: expected at most 192"),
    (["federation.ranks={8:0.5,193:0.5}"], "largest of federation.ranks"),
    (["adapter.target_modules=[q_prj]"], "no linear layer is named 'q_prj'"),
    (["adapter.rank=100", "adapter.sketch=true"], "adapter.sketch: at rank 100"),
    (["model.path=./nowhere"], "found neither"),
    (["model.path=package:nobody_has_this"], "is not installed"),
    (["data=gsm8k", "data.path=nowhere.jsonl"], "no such file or folder"),
    (["data=sick", "data.path={sick}"], "takes an encoder"),
    (["data=sick", "data.path={sick}", "audit.canaries=4"], "a canary is a text"),
    (["data=sick", "data.path={sick}", "data.task_column=kind"], "expected the field 'kind' (data.task_column)"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_a_mistake_is_reported_without_loading_in_the_words_of_loading(tmp_path, words, told):
    sick = write_sick(tmp_path / "SICK.txt")
    config = compose([*FEW, *(word.format(sick=sick) if "{sick}" in word else word for word in words)])
    with pytest.raises(UserError) as early:
        check(config)
    assert told in str(early.value)
    with pytest.raises(UserError) as late:
        open_session(config)
    assert str(late.value) == str(early.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_accepts_exactly_what_the_loaded_model_accepts(tmp_path, architecture):
    tiny_model(architecture).save_pretrained(tmp_path)
    names = [[], ["q_proj"], ["c_attn"], ["query", "dense"]]
    for rank, modules in [(rank, modules) for rank in (16, 32, 33, 48, 49) for modules in names]:
        config = compose([f"model.path={tmp_path}", f"adapter.rank={rank}", f"adapter.target_modules=[{','.join(modules)}]"])
        assert refusal(check, config) == refusal(adapt, tiny_model(architecture), LORA_SB, rank, 1, 1.0, modules)


def test_a_classifier_is_checked_with_its_head(tmp_path):
    options = ["data=sick", f"data.path={write_sick(tmp_path / 'SICK.txt')}", f"model.path={save_classifier(tmp_path / 'model')}"]
    for words in (["adapter.rank=32"], ["adapter.rank=33"], ["adapter.target_modules=[classifier]"], ["model.pairs=apart"]):
        config = compose([*FEW, *options, *words])
        assert refusal(check, config) == refusal(open_session, config)


def test_a_hub_model_is_checked_by_its_cached_configuration_only(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was attempted"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = compose(["model=mistral_7b", "adapter.rank=2000"])
    check(config)  # model.architecture may be that of another model
    of_rank = lambda rank: replace(config, adapter=replace(config.adapter, rank=rank))  # noqa: E731
    snapshot = tmp_path / "models--mistralai--Mistral-7B-v0.1" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--mistralai--Mistral-7B-v0.1" / "refs").mkdir()
    (tmp_path / "models--mistralai--Mistral-7B-v0.1" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(config.model.architecture | {"num_key_value_heads": 4}))
    check(of_rank(512))
    with pytest.raises(UserError, match=r"adapter\.rank: expected at most 512, .*k_proj"):
        check(of_rank(513))


def test_an_unknown_configuration_is_left_to_the_loader(tmp_path):
    for entries in ({}, {"model_type": "of one's own", "auto_map": {}}, {"model_type": "llama", "hidden_size": "wide"}):
        (tmp_path / "config.json").write_text(json.dumps(entries))
        check(compose([f"model.path={tmp_path}", "adapter.rank=5000"]))


def test_the_embedded_model_ignores_a_configured_architecture():
    config = compose(["adapter.rank=192"])
    check(replace(config, model=replace(ModelConfig(), architecture={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})))

"""What server and client compare before they train together."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from tokenizers.normalizers import Lowercase

from fedsim import session as sessions
from fedsim.cli.compose import compose
from fedsim.core.adapters import adapted_layers
from fedsim.session import forget_session, open_session


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


def test_the_base_digest_tells_weights_without_adapters_and_what_the_tokenizer_makes_of_a_text(session):
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


def test_the_base_digest_leaves_out_the_weights_into_which_a_run_folds_its_updates(session):
    own, layer = digest_now(session), next(iter(adapted_layers(session.model).values()))
    with changed(layer.base.weight):
        assert digest_now(session) == own


def test_the_last_model_is_let_go_before_the_next_one_is_loaded(monkeypatch):
    options = ("data.train_examples=20", "federation.clients=2", "adapter.init=orthogonal")
    last = weakref.ref(open_session(compose([*options, "seed=1"])).model)
    load, there = sessions.load_model, []

    def watched(*args, **named):
        gc.collect()
        there.append(last() is not None)
        return load(*args, **named)

    monkeypatch.setattr(sessions, "load_model", watched)
    assert open_session(compose([*options, "seed=2"])) is open_session(compose([*options, "seed=2"]))
    assert there == [False]

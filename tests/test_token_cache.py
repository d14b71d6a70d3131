"""Tokens cached on disk equal freshly made ones, whatever happens to the file."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import LABELS, save_classifier, write_sick

from fedsim import token_cache
from fedsim.choices import Init, PairReading, TrainOn
from fedsim.config import AdapterConfig, Config, DataConfig, FederationConfig, ModelConfig
from fedsim.models import load_model
from fedsim.plain import to_dict
from fedsim.session import Session
from fedsim.training.encoding import encode
from fedsim.training.flat_tokens import flattened
from fedsim.training.labelled import encode_labelled
from fedsim.types import EncodedExample, Example, Family, Labelled, Turn

CLIENTS = 4


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder of a user; pools of any size are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST_CHARACTERS", 0)
    return tmp_path / "cache/fedsim/tokens"


def config(**data):
    return Config(
        model=ModelConfig(device="cpu"),
        adapter=AdapterConfig(rank=2, init=Init.orthogonal),
        data=DataConfig(train_examples=40, test_examples=1, **data),
        federation=FederationConfig(clients=CLIENTS),
    )


@pytest.fixture
def classified(tmp_path):
    """A configuration whose data are pairs."""
    model = ModelConfig(path=save_classifier(tmp_path / "model"), device="cpu")
    data = DataConfig(path=write_sick(tmp_path / "sick.tsv"), train=["sick"], test=["sick"])
    return dataclasses.replace(config(), model=model, data=data)


def tokens(config):
    """All clients' examples, from a new session."""
    session = Session(config)
    return [list(session.client_data(client).examples) for client in range(CLIENTS)]


def without(config):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, token_cache=False))


def mapped(examples):
    """Whether the tokens are mapped from a file."""
    array = examples[0].input_ids
    while not isinstance(array, np.memmap) and array.base is not None:
        array = array.base
    return isinstance(array, np.memmap)


def fresh_tokens_and_file(folder):
    """All clients' examples made without a file, and a file that no session has mapped, so that tests may damage it."""
    tokens(config())
    return tokens(without(config())), only_file(folder)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("train_on", TrainOn)
def test_tokens_are_equal_without_a_cache_when_cached_and_when_read(folder, train_on, monkeypatch):
    plain = tokens(without(config(train_on=train_on)))
    assert not folder.exists()
    assert tokens(config(train_on=train_on)) == plain
    monkeypatch.setattr(Session, "encode", None)  # from now on nothing is tokenised
    found = tokens(config(train_on=train_on))
    assert found == plain
    assert all(map(mapped, found))
    assert not mapped(plain[0])


@pytest.mark.parametrize("reading", PairReading)
def test_pairs_are_equal_without_a_cache_when_cached_and_when_read(classified, reading, monkeypatch):
    given = dataclasses.replace(classified, model=dataclasses.replace(classified.model, pairs=reading))
    plain = tokens(without(given))
    assert tokens(given) == plain
    monkeypatch.setattr(Session, "encode", None)
    assert tokens(given) == plain
    assert bool(plain[0][0].split) == (reading is PairReading.apart)


def test_each_pool_tokenizer_and_encoding_has_its_own_file(folder, classified):
    apart = dataclasses.replace(classified, model=dataclasses.replace(classified.model, pairs=PairReading.apart))
    others = [config(max_length=200), config(train_on=TrainOn.all), dataclasses.replace(config(), seed=1), classified, apart]
    for count, each in enumerate([config(), *others], 1):
        tokens(each)
        assert len(list(folder.iterdir())) == count
    dealt = dataclasses.replace(config(), federation=FederationConfig(clients=CLIENTS, fraction=0.5, quantity_sigma=1.0))
    Session(dealt).client_data(0)
    assert len(list(folder.iterdir())) == count, "how the pool is dealt changes no tokens"


EXAMPLES = [Example("t", Family.arithmetic, "tom has 1 2 apples .", "1 2", "12"), Example("t", Family.arithmetic, "a b", "c", "1")]
LABELLED = [Labelled("sick", "w1 w2", "w3", LABELS[0], LABELS), Labelled("sick", "w4", "w5", LABELS[1], LABELS)]


def name(folder, pool, tokenizer, how=()):
    """The name of the new file for a pool, "known" if it existed, None if the pool is not cached."""
    before = set(folder.iterdir()) if folder.exists() else set()
    if token_cache.kept(pool, tokenizer, how, lambda pool: [EncodedExample((1, 2), 1) for _ in pool]) is None:
        return None
    new = set(folder.iterdir()) - before
    return new.pop().name if new else "known"


def test_encodings_are_those_of_this_cache_version(tmp_path):
    _, tokenizer = load_model(ModelConfig(path=save_classifier(tmp_path), device="cpu"), LABELS)
    tokenizer.eos_token = "[SEP]"
    examples = encode([Example("t", Family.arithmetic, "w1 w2", "w3", "3")], tokenizer, 512, TrainOn.response)
    together, apart = (encode_labelled(LABELLED[:1], tokenizer, 512, apart=apart) for apart in (False, True))
    assert (token_cache.VERSION, *(flattened(each).tolist() for each in (examples, together, apart))) == (
        1,
        [0, 1, 5, 0, 0, 3, 1, 5, 6, 7, 2],
        [1, 1, 6, 6, 0, 0, 1, 5, 6, 2, 7, 2, 0, 0, 0, 0, 1, 1],
        [1, 1, 7, 0, 4, 0, 1, 5, 6, 2, 1, 7, 2],
    )


@pytest.mark.parametrize(
    "pool",
    [
        EXAMPLES[::-1],
        EXAMPLES[:1],
        [dataclasses.replace(EXAMPLES[0], prompt="tom has 1 2 apples .1", response=" 2"), EXAMPLES[1]],
        [dataclasses.replace(EXAMPLES[0], turns=(Turn("user", "tom"),)), EXAMPLES[1]],
        LABELLED,
        [dataclasses.replace(LABELLED[0], answer=LABELS[2]), LABELLED[1]],
        [dataclasses.replace(LABELLED[0], premise="w1 w2 w3", hypothesis=" "), LABELLED[1]],
        [dataclasses.replace(each, hypothesis=None) for each in LABELLED],
    ],
)
def test_another_order_or_another_border_between_texts_gives_another_file(folder, pool, tmp_path):
    _, tokenizer = load_model(ModelConfig(device="cpu"))
    for known in (EXAMPLES, LABELLED):
        name(folder, known, tokenizer)
    assert (name(folder, pool, tokenizer) == "known") == (pool == LABELLED)


def test_a_tokenizer_is_identified_by_its_rules_and_not_by_its_path_or_last_call(folder, tmp_path):
    _, tokenizer = load_model(ModelConfig(device="cpu"))
    first = name(folder, EXAMPLES, tokenizer)
    tokenizer(["tom has"], truncation=True, max_length=2, padding="max_length")
    assert name(folder, EXAMPLES, tokenizer) == "known"
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    moved = from_folder(tmp_path / "elsewhere")
    moved.model_max_length = tokenizer.model_max_length
    assert name(folder, EXAMPLES, moved) == "known"
    moved.model_max_length -= 1
    assert name(folder, EXAMPLES, moved) not in ("known", first)
    moved.add_tokens(["zebra"])
    assert name(folder, EXAMPLES, moved) != "known"
    moved.eos_token = "zebra"
    assert name(folder, EXAMPLES, moved) != "known"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "version", lambda package: "another")
        assert name(folder, EXAMPLES, moved) != "known"


def from_folder(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def truncated(content):
    return content[:-4]


def changed(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def without_checksum(content):
    return content.replace(content[128:160], bytes(32))


DAMAGES = {
    "truncated": truncated,
    "one bit": changed,
    "no checksum": without_checksum,
    "empty": lambda content: b"",
    "text": lambda content: b"no numpy file",
    "head only": lambda content: content[:128],
    "too long": lambda content: content.replace(b"(", b"(9999999", 1),
    "longer": lambda content: content + b"1234",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(folder, damage):
    plain, path = fresh_tokens_and_file(folder)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert tokens(config()) == plain
    if damage != "longer":  # bytes after the tokens are not read
        assert only_file(folder).read_bytes() == whole


@pytest.mark.parametrize("array", [np.zeros(100), np.zeros((10, 10), dtype=np.int32), np.zeros(3, dtype=np.int32)])
def test_a_file_of_another_array_is_replaced(folder, array):
    plain, path = fresh_tokens_and_file(folder)
    whole = path.read_bytes()
    np.save(path, array)
    assert tokens(config()) == plain
    assert path.read_bytes() == whole


def test_a_file_under_another_name_is_refused(folder):
    plain, right = fresh_tokens_and_file(folder)
    tokens(config(train_on=TrainOn.all))
    (wrong,) = set(folder.iterdir()) - {right}
    right.write_bytes(wrong.read_bytes())
    assert tokens(config()) == plain


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_file_is_never_opened(folder, tmp_path):
    plain, path = fresh_tokens_and_file(folder)
    np.save(path, np.array([Payload(tmp_path / "executed")] * 20, dtype=object), allow_pickle=True)
    assert tokens(config()) == plain
    assert not (tmp_path / "executed").exists()


def test_only_the_user_may_read_the_tokens(folder):
    tokens(config())
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("obstacle", ["file", "directory", "full disk", "no home"])
def test_tokens_are_computed_if_nothing_can_be_written(folder, obstacle, monkeypatch):
    plain = tokens(without(config()))
    if obstacle == "file":
        folder.parent.mkdir(parents=True)
        folder.write_text("in the way")
    elif obstacle == "directory":
        tokens(config())
        path = only_file(folder)
        path.unlink()
        (path / "in the way").mkdir(parents=True)
    elif obstacle == "full disk":
        monkeypatch.setattr(token_cache, "atomic_write", lambda *content, mode: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    else:
        monkeypatch.setattr(token_cache, "cache_folder", Path("~nobody-of-this-name/x").expanduser)
    assert tokens(config()) == plain
    assert not folder.is_dir() or not [path for path in folder.iterdir() if path.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_no_error(folder):
    folder.mkdir(parents=True, mode=0o500)
    assert tokens(config()) == tokens(without(config()))


def test_a_small_pool_and_a_slow_tokenizer_leave_no_file(folder, monkeypatch):
    _, tokenizer = load_model(ModelConfig(device="cpu"))
    characters = sum(len(example.prompt) + len(example.response) for example in EXAMPLES)
    monkeypatch.setattr(token_cache, "LEAST_CHARACTERS", characters + 1)
    assert name(folder, EXAMPLES, tokenizer) is None
    monkeypatch.setattr(token_cache, "LEAST_CHARACTERS", characters)

    class Slow:
        is_fast = False

    assert name(folder, EXAMPLES, Slow()) is None
    assert not folder.exists()
    assert name(folder, EXAMPLES, tokenizer)


def test_without_a_file_only_the_requested_clients_are_tokenised(monkeypatch):
    sizes, encode = [], Session.encode
    monkeypatch.setattr(Session, "encode", lambda self, examples: sizes.append(len(examples)) or encode(self, examples))
    Session(without(config())).client_data(1)
    Session(config()).client_data(1)
    assert sizes == [10, 40]


def test_a_new_file_removes_long_unused_ones(folder):
    _, tokenizer = load_model(ModelConfig(device="cpu"))
    old, used = (folder / name(folder, EXAMPLES, tokenizer, [how]) for how in ("old", "used"))
    long_ago = time.time() - (token_cache.UNUSED_DAYS + 1) * 24 * 3600
    for path in (old, used):
        os.utime(path, (long_ago, long_ago))
    assert name(folder, EXAMPLES, tokenizer, ["used"]) == "known"
    new = folder / name(folder, EXAMPLES, tokenizer, ["new"])
    assert set(folder.iterdir()) == {used, new}


PROCESS = """
import json, sys
from fedsim import token_cache
from fedsim.config import Config
from fedsim.plain import from_dict
from fedsim.session import Session
token_cache.LEAST_CHARACTERS = 0
session = Session(from_dict(Config, json.loads(sys.argv[1])))
print(json.dumps([[each.input_ids.tolist() for each in session.client_data(client).examples] for client in range(4)]))
"""


def test_the_second_writer_replaces_the_file_by_the_same_one(folder, monkeypatch):
    """The second session starts and ends while the first one encodes."""
    plain, encode, inner = tokens(without(config())), Session.encode, []

    def encoding(session, examples):
        monkeypatch.setattr(Session, "encode", encode)
        inner.append(tokens(config()))
        inner.append(only_file(folder).read_bytes())
        return encode(session, examples)

    monkeypatch.setattr(Session, "encode", encoding)
    assert tokens(config()) == inner[0] == plain
    assert only_file(folder).read_bytes() == inner[1]


@pytest.mark.slow
def test_racing_processes_get_the_same_tokens(folder):
    expected = [[each.input_ids.tolist() for each in examples] for examples in tokens(without(config()))]
    command = [sys.executable, "-c", PROCESS, json.dumps(to_dict(config()))]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [json.loads(process.communicate()[0]) for process in started] == [expected] * 3
    assert only_file(folder).suffix == ".npy", "no temporary file is left"

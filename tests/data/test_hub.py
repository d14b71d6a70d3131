"""Remote rows: hub data sets by the real library from a local folder, files from a real server in this process."""

import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from fedsim.config import DataConfig
from fedsim.data import load, loading
from fedsim.data.hub import Address, Hub
from fedsim.data.loading import remote_of
from fedsim.data.sets import SETS
from fedsim.errors import UserError
from fedsim.files import cache_folder

ROWS = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(3000)]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()


@pytest.fixture
def hub_folder(tmp_path):
    (tmp_path / "copy/data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"copy/data/{split}-00000-of-00001.parquet")
    return tmp_path / "copy"


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def site(tmp_path):
    """A server of the folder `tmp_path/site`, and its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "site").mkdir()
    server, address = serve(partial(Quiet, directory=str(tmp_path / "site")))
    yield tmp_path / "site", address
    server.shutdown()
    server.server_close()


def test_rows_of_a_data_set_are_numbered_from_one(hub_folder):
    assert list(Hub(str(hub_folder)).rows("train")) == list(enumerate(ROWS, 1))
    assert len(list(Hub(str(hub_folder)).rows("test"))) == 5


def test_a_part_of_a_users_own_data_set_without_a_test_split_is_held_out(hub_folder, monkeypatch):
    (hub_folder / "data/test-00000-of-00001.parquet").unlink()
    (hub_folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n")
    monkeypatch.setattr(loading, "remote_of", lambda config, name: Hub(str(hub_folder)))  # the folder in place of the hub
    data = load(DataConfig(train=["gsm8k"], test=["gsm8k"], path="someone/else"), 0)
    assert (len(data.train), len(data.test["gsm8k"])) == (2700, 300)
    assert {example.answer for example in (*data.train, *data.test["gsm8k"])} == {str(n) for n in range(3000)}
    assert data.skipped == [f"{hub_folder} (train): 300 of 3,000 rows are held out as the test set"]


def test_a_missing_split_is_reported_in_one_line(hub_folder):
    with pytest.raises(UserError, match=r"copy \(validation\): this data set cannot be fetched: Unknown split") as caught:
        list(Hub(str(hub_folder)).rows("validation"))
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_reported_in_one_line_within_seconds(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    for path, name in ((None, "openai/gsm8k"), ("someone/else", "someone/else")):
        with pytest.raises(UserError) as caught:
            load(DataConfig(train=["gsm8k"], test=["gsm8k"], path=path), 0)
        assert str(caught.value).startswith(f"{name} (train): this data set cannot be fetched: ")
        assert str(caught.value).endswith("Check name and network, or give data.path= a local folder.")
        assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10  # the library alone retries for half a minute


def test_a_file_is_fetched_once_and_read_with_its_line_numbers(site):
    folder, address = site
    (folder / "boolq").mkdir()
    (folder / "boolq/test.json").write_text(json.dumps(ROWS[:2], indent=1))
    (folder / "boolq/train.json").write_text(json.dumps(ROWS[2:5], indent=1))
    source = Address(address + "/boolq/{split}.json")
    assert [row for _, row in source.rows("train")] == ROWS[2:5]
    for _ in range(2):
        assert list(source.rows("test")) == [(2, ROWS[0]), (6, ROWS[1])]
        (folder / "boolq/test.json").unlink(missing_ok=True)  # the second time it comes from the cache


def test_a_missing_file_is_refused_and_leaves_no_file(site):
    with pytest.raises(UserError, match=r"/none.json: this data set cannot be fetched: HTTP Error 404: File not found. Check name"):
        list(Address(f"{site[1]}/none.json").rows("train"))
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_download_stopped_by_ctrl_c_leaves_no_file_and_is_repeated_the_next_time(site, monkeypatch):
    folder, address = site
    (folder / "train.json").write_text(json.dumps(ROWS[:1]))

    def stopped(reply, file):
        file.write(reply.read(3))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedsim.data.hub.shutil", SimpleNamespace(copyfileobj=stopped))  # the server of this test needs its own
        with pytest.raises(KeyboardInterrupt):
            list(Address(f"{address}/train.json").rows("train"))
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    assert [row for _, row in Address(f"{address}/train.json").rows("train")] == ROWS[:1]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[{}]", r"the connection closed 996 bytes too early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n[{}]\r\n9\r\n[", r"IncompleteRead\(4 bytes read"),
        (b"nothing that HTTP knows\r\n\r\n", r"nothing that HTTP knows"),
    ],
)
def test_an_incomplete_download_is_not_kept(answer, told):
    class Short(BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server, address = serve(Short)
    with pytest.raises(UserError, match=told):
        list(Address(f"{address}/a.json").rows("train"))
    server.shutdown()
    server.server_close()
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_hub_name_in_data_path_applies_only_to_the_training_set():
    config = DataConfig(train=["gsm8k"], test=["gsm8k", "math"], path="someone/else")
    assert remote_of(config, "gsm8k") == Hub("someone/else")
    assert remote_of(config, "math") == SETS["math"].remote
    assert remote_of(DataConfig(train=["gsm8k"], test=["gsm8k"]), "gsm8k") == SETS["gsm8k"].remote
    with pytest.raises(UserError, match=r"data.path=someone/else: a hub name holds one training set, got data.train=\[gsm8k,math\]"):
        load(DataConfig(train=["gsm8k", "math"], test=["gsm8k"], path="someone/else"), 0)


def test_every_split_of_every_set_has_a_source_of_its_own():
    divided = [each for each in SETS.values() if not each.in_one and each.remote is not None]
    places = [each.remote.place(split) for each in divided for split in ("train", "test") if each.patterns(split)]
    assert len(set(places)) == len(places) == 2 * (len(divided) - 2) + 2  # two sets are for training only

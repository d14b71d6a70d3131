"""Flower's messages over a byte stream: what was sent is read back, and anything else is refused."""

import io
import random

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.framing import CutOffError, FrameError, read_message, read_records, write_message, write_records

LIMIT = 10**7


@pytest.fixture(autouse=True)
def _identity():
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 7, 0


def message(size=1000):
    """Returns a message with every kind of record and with an id, as Flower gives it."""
    values = np.arange(size, dtype=np.float32)
    content = RecordDict(
        {
            "adapter": ArrayRecord({"values": Array(values), "empty": Array(np.zeros((0, 3), np.int64))}),
            "request": ConfigRecord({"config": "{}", "clients": [1, 2], "secret": b"\0\xff", "flag": True}),
            "metrics": MetricRecord({"loss": [0.5, 2.0]}),
        }
    )
    made = Message(content, 5, "train", group_id="3")
    made.metadata.__dict__["_message_id"] = "an id"
    return made


def bytes_of(write, value):
    buffer = io.BytesIO()
    write(buffer.write, value)
    return buffer.getvalue()


def read(data, limit=LIMIT):
    return read_message(io.BytesIO(data).read, limit)


def test_a_message_is_read_back_with_its_records_its_id_and_its_addresses():
    found, sent = read(bytes_of(write_message, message())), message()
    assert found.content["request"] == sent.content["request"]
    assert found.content["metrics"] == sent.content["metrics"]
    np.testing.assert_array_equal(found.content["adapter"]["values"].numpy(), sent.content["adapter"]["values"].numpy())
    assert found.content["adapter"]["empty"].numpy().shape == (0, 3)
    kept = ("message_id", "message_type", "dst_node_id", "src_node_id", "run_id", "group_id")
    assert all(getattr(found.metadata, name) == getattr(sent.metadata, name) for name in kept)


def test_a_reply_to_a_read_message_names_the_message_that_was_sent():
    reply = Message(Error(1000, "no"), reply_to=read(bytes_of(write_message, message())))
    found = read(bytes_of(write_message, reply))
    assert (found.metadata.reply_to_message_id, found.error.code, found.error.reason) == ("an id", 1000, "no")


def test_records_are_read_back_and_are_refused_as_a_message():
    data = bytes_of(write_records, message().content)
    assert read_records(io.BytesIO(data).read, LIMIT)["request"] == message().content["request"]
    with pytest.raises(FrameError, match="Expected a message, got RecordDict"):
        read(data)


def test_a_stream_in_small_pieces_is_read_like_a_whole_one():
    stream = io.BytesIO(bytes_of(write_message, message()))
    found = read_message(lambda size: stream.read(min(size, 7)), LIMIT)
    assert found.content["request"] == message().content["request"]


def test_a_message_may_be_as_large_as_the_limit_and_no_byte_larger():
    data = bytes_of(write_message, message())
    sizes = [limit for limit in range(len(data) - 500, len(data)) if _readable(data, limit)]
    assert sizes == list(range(sizes[0], len(data)))
    with pytest.raises(FrameError, match=f"at most {sizes[0] - 1} bytes"):
        read(data, sizes[0] - 1)


def _readable(data, limit):
    try:
        read(data, limit)
    except FrameError:
        return False
    return True


def test_the_end_of_a_stream_is_distinguished_from_a_message_that_is_cut_off():
    data = bytes_of(write_message, message())
    with pytest.raises(EOFError):
        read(b"")
    for length in (1, 10, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(CutOffError):
            read(data[:length])


def test_a_false_length_allocates_no_memory():
    asked = []

    def endless(size):
        asked.append(size)
        return head.pop(0)[:size] if head else b""

    head = [bytes_of(write_message, message())[:14], b"an id", (2**62).to_bytes(8)]
    with pytest.raises(FrameError):
        read_message(endless, 2**63)
    assert max(asked) <= 1 << 20


def test_a_flipped_bit_is_refused_or_leaves_the_records_unchanged():
    """Every object is named by its digest, so any flip is detected but one in the id or the root object, whose metadata Flower trusts."""
    data, rng = bytes_of(write_message, message(10)), random.Random(0)
    values = message(10).content["adapter"]["values"].numpy()
    for _ in range(1000):
        place = rng.randrange(len(data))
        broken = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        try:
            found = read(broken)
        except FrameError:
            continue
        assert found.content["request"] == message().content["request"]
        np.testing.assert_array_equal(found.content["adapter"]["values"].numpy(), values)


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_are_refused(seed):
    rng = random.Random(seed)
    for _ in range(300):
        data = b"fedsim1\n" * rng.randrange(2) + rng.randbytes(rng.randrange(200))
        with pytest.raises((FrameError, EOFError)):
            read(data)

"""Flower's messages as a byte stream, between the client app and its worker and in the files with a client's state.

Flower 1.41 serialises a message as a tree of objects that refer to their children by SHA-256. Here they follow one another, children
first, each after its length; an altered object does not match the digest in its parent and is not found. No pickle, compression or code.
"""

import struct
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content

Write = Callable[[bytes], object]
Read = Callable[[int], bytes]
"""Returns at most the given number of bytes, at least one unless the stream has ended."""

MAGIC = b"fedsim1\n"
MOST_OBJECTS = 1_000_000
LONGEST_ID = 256
_HEAD = struct.Struct(">8sHI")  # magic, length of the message's id, number of objects
_LENGTH = struct.Struct(">Q")


class FrameError(ValueError):
    """The input is no message, is cut off, or is larger than allowed."""


class CutOffError(FrameError):
    """The stream ended within a message: the writer is gone."""


def write_message(write: Write, message: Message) -> None:
    """Writes a message with its id, which Flower does not serialise but needs in a reply."""
    _write(write, message, message.metadata.message_id)


def read_message(read: Read, limit: int) -> Message:
    """Reads the next message. Raises FrameError unless it is one of at most `limit` bytes, EOFError if the stream ends before it begins."""
    found, name = _read(read, limit)
    if not isinstance(found, Message):
        raise FrameError(f"Expected a message, got {type(found).__name__}.")
    found.metadata.__dict__["_message_id"] = name
    return found


def write_records(write: Write, records: RecordDict) -> None:
    """Writes the records of a Context."""
    _write(write, records, "")


def read_records(read: Read, limit: int) -> RecordDict:
    """Returns what `write_records` wrote. Raises FrameError or EOFError as `read_message` does."""
    found, _ = _read(read, limit)
    if not isinstance(found, RecordDict):
        raise FrameError(f"Expected records, got {type(found).__name__}.")
    return found


def _write(write: Write, root: InflatableObject, name: str) -> None:
    objects = get_all_nested_objects(root)
    encoded = name.encode()
    write(_HEAD.pack(MAGIC, len(encoded), len(objects)) + encoded)
    for each in objects.values():
        content = each.deflate()
        write(_LENGTH.pack(len(content)))
        write(content)


def _read(read: Read, limit: int) -> tuple[InflatableObject, str]:
    magic, length, count = _HEAD.unpack(_read_exactly(read, _HEAD.size, at_start=True))
    if magic != MAGIC or length > LONGEST_ID or not 0 < count <= MOST_OBJECTS:
        raise FrameError(f"Expected the head of a message, got {magic!r} with {length=} and {count=}.")
    name = _read_exactly(read, length)
    contents, left, last = {}, limit, ""
    for _ in range(count):
        (size,) = _LENGTH.unpack(_read_exactly(read, _LENGTH.size))
        left -= size
        if left < 0:
            raise FrameError(f"Expected a message of at most {limit} bytes, got more.")
        content = _read_exactly(read, size)
        last = get_object_id(content)
        contents[last] = content
    return _inflated(contents, last), name.decode(errors="replace")


def _inflated(contents: dict[str, bytes], root: str) -> InflatableObject:
    try:
        for content in contents.values():
            validate_object_content(content)
        return inflate_object_from_contents(root, contents)
    except Exception as error:  # whatever Flower and protobuf raise for invalid bytes
        raise FrameError(f"Expected Flower's objects, got something else ({type(error).__name__}: {error!s:.200}).") from error


def _read_exactly(read: Read, size: int, *, at_start: bool = False) -> bytes:
    """Reads `size` bytes in parts, so that a false length takes no memory before the bytes arrive."""
    parts, left = [], size
    while left:
        part = read(min(left, 1 << 20))
        if not part:
            if at_start and left == size:
                raise EOFError("The stream ended where a message should begin.")
            raise CutOffError(f"Expected {size} bytes, got {size - left}: the stream ended.")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)

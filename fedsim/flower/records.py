"""Converts tensors to and from Flower records, and measures their size as Flower serialises them.

Tensors only, in NumPy's own format without pickle. Incoming records are checked before use.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.constant import SType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from torch import Tensor

from fedsim.core.compression import Arrays, Shapes

KEY = "values"  # the one array in a record
NUMPY_HEAD = re.compile(
    r"\x93NUMPY\x01\x00..\{'descr': '([<|][fiu]\d)', 'fortran_order': False, 'shape': (\(\d+,\)|\(\d+, \d+\)), \} *\n", re.DOTALL
)
LONGEST_HEAD = 256  # bytes; NumPy writes 128 for these arrays
_sizes: dict[tuple[tuple[str, str, tuple[int, ...], int], ...], int] = {}
_float_sizes: dict[int, int] = {}


def to_record(flat: Tensor) -> ArrayRecord:
    """Returns a record of one float32 array."""
    return arrays_to_record({KEY: flat.to(torch.float32)})


def arrays_to_record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Returns a record of named arrays, such as a compressed upload."""
    return ArrayRecord({name: _array(tensor) for name, tensor in arrays.items()})


def _array(tensor: Tensor) -> Array:
    """Returns the same as Flower's `Array(values)`, byte for byte, with one copy of the numbers instead of three."""
    values, dtype = tensor.detach().cpu().contiguous().numpy(), _numpy_type(tensor.dtype)
    data = b"".join((_head(dtype.descr, values.shape), values.reshape(-1).data))
    return Array(dtype=dtype.name, shape=values.shape, stype=SType.NUMPY, data=data)


class _NumpyType(NamedTuple):
    """NumPy's names of a tensor type, kept because NumPy rebuilds them on every access."""

    dtype: np.dtype[Any]
    name: str
    descr: str


@cache
def _numpy_type(dtype: torch.dtype) -> _NumpyType:
    found = torch.empty(0, dtype=dtype).numpy().dtype
    return _NumpyType(found, found.name, found.str)


@cache
def _head(descr: str, shape: tuple[int, ...]) -> bytes:
    """Returns the header of an array in NumPy's format; a run has a handful of shapes."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    return head.getvalue()


def from_record(record: ArrayRecord, num_parameters: int) -> Tensor:
    """Returns the flat tensor [num_parameters]. Raises ValueError for other names, types or shapes and for values that are not finite."""
    values = unchecked_from_record(record, num_parameters)
    if not isfinite(float(values.sum())):  # a finite sum has finite terms; float64 rules out overflow
        check_finite(float(values.sum(dtype=torch.float64)))
    return values


def unchecked_from_record(record: ArrayRecord, num_parameters: int) -> Tensor:
    """Returns and raises the same as `from_record`, except that values that are not finite are kept."""
    if list(record) != [KEY]:
        raise ValueError(f"Expected one array named {KEY!r}, got {list(record)[:3]}.")
    return _decoded(KEY, record[KEY], torch.float32, (num_parameters,))


def check_finite(sum_or_norm: float) -> None:
    """Raises ValueError if a sum or norm over an array shows that some of its values are not finite."""
    if not isfinite(sum_or_norm):
        raise ValueError("Expected finite values, got NaN or infinity.")


def _decoded(name: str, array: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns the numbers of an array of one or two dimensions. Raises ValueError unless header and data are exactly as expected.

    NumPy's reader is not used: it allocates what a header claims before it reads the data.
    """
    expected = _numpy_type(dtype)
    data, declared = array.data, (array.dtype, tuple(array.shape))
    if array.stype != SType.NUMPY or declared != (expected.name, shape) or not isinstance(data, bytes):
        raise ValueError(f"Expected {name!r} to be {expected.name} of shape {shape}, got {declared[0]!s:.20} {declared[1]!s:.40}.")
    size = prod(shape) * dtype.itemsize
    head = data[: len(data) - size].decode("latin-1") if size <= len(data) <= size + LONGEST_HEAD else ""
    found = NUMPY_HEAD.fullmatch(head)
    if found is None or found.groups() != (expected.descr, str(shape)):
        raise ValueError(
            f"Expected {size} bytes of {expected.name} under {name!r} in NumPy's format, got {len(data)} bytes of something else."
        )
    return torch.from_numpy(np.frombuffer(data, expected.dtype, prod(shape), len(data) - size).reshape(shape).copy())


def record_of(records: Mapping[str, ArrayRecord], name: str) -> ArrayRecord:
    """Returns the record of this name. Raises ValueError if there is none."""
    if name not in records:
        raise ValueError(f"Expected a record {name!r}, got none.")
    return records[name]


def whole_number(record: ConfigRecord | MetricRecord, key: str) -> int:
    """Returns the whole number under `key`. Raises ValueError for anything else."""
    value = record.get(key)
    if type(value) is not int:
        raise ValueError(f"Expected {key!r} to be a whole number, got {value!r:.60}.")
    return value


def whole_numbers(record: ConfigRecord | MetricRecord, key: str) -> list[int]:
    """Returns the list of whole numbers under `key`. Raises ValueError for anything else."""
    values = record.get(key)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"Expected {key!r} to be a list of whole numbers, got {values!r:.60}.")
    return list(values)  # type: ignore[arg-type]


def numbers(record: ConfigRecord | MetricRecord, key: str) -> list[float]:
    """Returns the list of numbers under `key`. Raises ValueError for anything else."""
    values = record.get(key)
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"Expected {key!r} to be a list of numbers, got {values!r:.60}.")
    return [float(value) for value in values]


def byte_rows(rows: Sequence[bytes], length: int) -> Tensor:
    """Returns rows of `length` bytes each as uint8 [rows, length]."""
    if not rows:
        return torch.zeros(0, length, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), length)


def arrays_from_record(record: ArrayRecord, shapes: Shapes) -> Arrays:
    """Returns the named arrays. Raises ValueError for unexpected names, types or shapes."""
    if set(record) != set(shapes):
        raise ValueError(f"Expected the arrays {sorted(shapes)}, got {sorted(record)[:5]}.")
    return {name: _decoded(name, record[name], dtype, shape) for name, (dtype, shape) in shapes.items()}


def identifiers(record: ArrayRecord, name: str) -> list[int]:
    """Returns the whole numbers of a flat int64 array of any length. Raises ValueError for anything else."""
    if name not in record or len(record[name].shape) != 1:
        raise ValueError(f"Expected a flat array {name!r}, got {sorted(record)[:5]}.")
    values: list[int] = _decoded(name, record[name], torch.int64, tuple(record[name].shape)).tolist()
    return values


def payload_bytes(record: ArrayRecord) -> int:
    """Returns the bytes of the arrays' numbers alone."""
    return sum(prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())


def size_of_floats(num_parameters: int) -> int:
    """Returns `serialized_bytes` of a record of this many float32 numbers."""
    if num_parameters not in _float_sizes:
        _float_sizes[num_parameters] = serialized_bytes(to_record(torch.zeros(num_parameters)))
    return _float_sizes[num_parameters]


def serialized_bytes(record: ArrayRecord) -> int:
    """Returns the bytes of the record as Flower 1.41 puts it on the wire: the record, its arrays' headers and their chunks.

    The size depends only on names, types, shapes and lengths, so it is measured once for each combination.
    """
    signature = tuple((name, array.dtype, tuple(array.shape), len(array.data)) for name, array in record.items())
    if signature not in _sizes:
        _sizes[signature] = sum(len(part.deflate()) for part in get_all_nested_objects(record).values())
    return _sizes[signature]

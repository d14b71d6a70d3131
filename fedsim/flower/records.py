"""Flat float32 tensors in and out of Flower records, and their size as Flower serialises them.

Tensors only: NumPy's own format without pickle. What arrives is checked before it is believed.
"""

from math import prod

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from torch import Tensor

KEY = "values"  # the one array in a record
_sizes: dict[tuple[tuple[str, str, tuple[int, ...], int], ...], int] = {}
_float_sizes: dict[int, int] = {}


def to_record(flat: Tensor) -> ArrayRecord:
    """Returns a record of one float32 array."""
    return ArrayRecord({KEY: Array(flat.detach().to("cpu", torch.float32).contiguous().numpy())})


def from_record(record: ArrayRecord, num_parameters: int) -> Tensor:
    """Returns the flat tensor [num_parameters]. Raises ValueError for other names, types or shapes and for values that are not finite."""
    if list(record) != [KEY]:
        raise ValueError(f"Expected one array named {KEY!r}, got {list(record)[:3]}.")
    array = record[KEY]
    if array.dtype != "float32" or tuple(array.shape) != (num_parameters,):
        raise ValueError(f"Expected a float32 array of shape ({num_parameters},), got {array.dtype} {tuple(array.shape)}.")
    values = array.numpy()
    if values.dtype != np.float32 or values.shape != (num_parameters,):
        raise ValueError(f"Expected the data to be float32 of shape ({num_parameters},), got {values.dtype} {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("Expected finite values, got NaN or infinity.")
    return torch.from_numpy(values)


def whole_numbers(record: ConfigRecord | MetricRecord, key: str) -> list[int]:
    """Returns the list of whole numbers under `key`. Raises ValueError where there is something else."""
    values = record[key]
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise ValueError(f"Expected {key!r} to be a list of whole numbers, got {values!r:.60}.")
    return [int(value) for value in values]


def numbers(record: ConfigRecord | MetricRecord, key: str) -> list[float]:
    """Returns the list of numbers under `key`. Raises ValueError where there is something else."""
    values = record[key]
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"Expected {key!r} to be a list of numbers, got {values!r:.60}.")
    return [float(value) for value in values]


def arrays_to_record(arrays: dict[str, Tensor]) -> ArrayRecord:
    """Returns a record of named arrays, as a compressed upload has them."""
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in arrays.items()})


def arrays_from_record(record: ArrayRecord, types: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Returns the named arrays. Raises ValueError where names, types or shapes are not the expected ones."""
    if set(record) != set(types):
        raise ValueError(f"Expected the arrays {sorted(types)}, got {sorted(record)[:5]}.")
    arrays = {}
    for name, (dtype, shape) in types.items():
        values = record[name].numpy()
        tensor = torch.from_numpy(values) if values.dtype.kind in "iuf" else torch.empty(0)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"Expected {name!r} to be {dtype} of shape {shape}, got {values.dtype} {values.shape}.")
        arrays[name] = tensor
    return arrays


def payload_bytes(record: ArrayRecord) -> int:
    """Returns the bytes of the arrays' numbers alone."""
    return sum(prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())


def size_of_floats(num_parameters: int) -> int:
    """Returns `serialized_bytes` of a record of as many float32 numbers."""
    if num_parameters not in _float_sizes:
        _float_sizes[num_parameters] = serialized_bytes(to_record(torch.zeros(num_parameters)))
    return _float_sizes[num_parameters]


def serialized_bytes(record: ArrayRecord) -> int:
    """Returns the bytes of the record as Flower 1.41 puts it on the wire: the record, its arrays' heads and their chunks.

    The size depends on types, shapes and lengths alone, so it is measured once for each.
    """
    signature = tuple((name, array.dtype, tuple(array.shape), len(array.data)) for name, array in record.items())
    if signature not in _sizes:
        _sizes[signature] = sum(len(part.deflate()) for part in get_all_nested_objects(record).values())
    return _sizes[signature]

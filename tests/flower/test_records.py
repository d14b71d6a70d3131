import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedsim.flower.records import KEY, arrays_to_record, from_record, serialized_bytes, to_record


def test_a_tensor_survives_the_round_trip_bit_for_bit():
    flat = torch.randn(1000)
    assert torch.equal(from_record(to_record(flat), 1000), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(0,), (1,), (1000,), (3, 5), (5, 0), (12_345, 7)])
def test_an_array_equals_the_one_flower_makes(dtype, shape):
    values = torch.randint(0, 100, shape).to(dtype).mT if len(shape) == 2 else torch.randint(0, 100, shape).to(dtype)
    assert arrays_to_record({"values": values})["values"] == Array(values.contiguous().numpy())


@pytest.mark.parametrize("size", [1, 1000, 28_672, 3_000_000])
def test_serialized_bytes_equal_what_flower_sends(size):
    for record in (to_record(torch.randn(size)), to_record(torch.randn(size))):  # the second size comes from the cache
        assert serialized_bytes(record) == sum(len(part.deflate()) for part in get_all_nested_objects(record).values())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ArrayRecord({"other": Array(np.zeros(4, np.float32))}), "one array named"),
        (ArrayRecord({KEY: Array(np.zeros(5, np.float32))}), "shape"),
        (ArrayRecord({KEY: Array(np.zeros((2, 2), np.float32))}), "shape"),
        (ArrayRecord({KEY: Array(np.zeros(4, np.float64))}), "float32"),
        (ArrayRecord({KEY: Array(np.array([1, np.nan, 0, 0], np.float32))}), "finite"),
        (ArrayRecord({KEY: Array(np.array([1, np.inf, 0, 0], np.float32))}), "finite"),
        (ArrayRecord({KEY: Array(np.array([1, np.inf, -np.inf, 0], np.float32))}), "finite"),
        (ArrayRecord({KEY: Array("float32", (4,), "numpy.ndarray", Array(np.zeros(9, np.float32)).data)}), "bytes of something else"),
        (ArrayRecord({KEY: Array("float32", (4,), "numpy.ndarray", Array(np.zeros(4, np.int32)).data)}), "bytes of something else"),
    ],
)
def test_anything_but_finite_float32_of_the_right_shape_is_refused(record, reason):
    with pytest.raises(ValueError, match=reason):
        from_record(record, 4)


def test_pickled_data_is_refused():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="bytes of something else"):
        from_record(ArrayRecord({KEY: Array("float32", (4,), "numpy.ndarray", buffer.getvalue())}), 4)


def test_the_largest_finite_values_are_accepted():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    assert from_record(to_record(largest), 1000).equal(largest)

"""Encoded examples as one flat array."""

import numpy as np
import pytest

from fedsim.training.flat_tokens import flattened, unflattened
from fedsim.types import EncodedExample, EncodedLabelled


@pytest.mark.parametrize("options", [None, {"segments": True}, {"segments": False}, {"apart": True}])
def test_examples_come_back_from_a_flat_array_as_views_of_it(sequences, pairs, options):
    examples = sequences(7) if options is None else pairs(7, **options)
    flat = flattened(examples)
    found = unflattened(flat)
    assert found == examples
    assert flat.dtype == np.int32
    assert all(np.shares_memory(example.input_ids, flat) for example in found)


def test_examples_of_one_token_and_without_a_loss_survive_flattening():
    examples = [EncodedExample((5,), 0), EncodedExample((6, 7), 2)]
    assert unflattened(flattened(examples)) == examples


def test_encoded_examples_are_equal_by_their_content_and_cannot_be_written():
    ids = np.arange(3, 9, dtype=np.int32)
    example = EncodedExample(ids, 2)
    assert example == EncodedExample((3, 4, 5, 6, 7, 8), 2)
    assert example not in (EncodedExample(ids, 3), EncodedExample(ids[:-1], 2), EncodedLabelled(ids, (), 2))
    assert EncodedLabelled(ids, (0, 1), 0) != EncodedLabelled(ids, (1, 0), 0)
    with pytest.raises(ValueError, match="read-only"):
        example.input_ids[0] = 1
    ids[0] = 4  # the caller's own array stays writable

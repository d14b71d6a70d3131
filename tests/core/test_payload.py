import hashlib

import pytest
import torch

from fedsim.core.payload import Layout, digest

ADAPTER = {"b.R": torch.arange(4.0).view(2, 2), "a.R": torch.arange(9.0).view(3, 3)}


def test_unpack_inverts_pack():
    layout = Layout.of(ADAPTER)
    flat = layout.pack(ADAPTER)
    assert flat.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert all(torch.equal(ADAPTER[name], tensor) for name, tensor in layout.unpack(flat).items())


def test_packing_does_not_depend_on_the_order_of_the_adapter():
    layout = Layout.of(ADAPTER)
    assert torch.equal(layout.pack(dict(reversed(ADAPTER.items()))), layout.pack(ADAPTER))


def test_pack_on_cpu_gives_the_same_array_and_refuses_missing_factors():
    layout = Layout.of(ADAPTER)
    coarse = {name: tensor.bfloat16() for name, tensor in reversed(ADAPTER.items())}
    assert torch.equal(layout.pack_on_cpu(coarse), layout.pack(ADAPTER))
    with pytest.raises(ValueError, match="Expected the factors"):
        layout.pack_on_cpu({"b.R": ADAPTER["b.R"]})


def test_unpack_keeps_a_leading_client_axis():
    layout = Layout.of(ADAPTER)
    stack = torch.stack([layout.pack(ADAPTER), -layout.pack(ADAPTER)])
    assert torch.equal(layout.unpack(stack)["a.R"][1], -ADAPTER["a.R"])


def test_pack_refuses_other_names_and_shapes():
    for other in ({"b.R": ADAPTER["b.R"]}, ADAPTER | {"b.R": torch.zeros(4)}):
        with pytest.raises(ValueError, match="Expected the factors"):
            Layout.of(ADAPTER).pack(other)


def test_digest_is_sha256_over_names_shapes_and_values_in_any_order():
    expected = hashlib.sha256()
    for name in ("a.R", "b.R"):
        expected.update(f"{name}{tuple(ADAPTER[name].shape)}".encode() + ADAPTER[name].numpy().astype("<f4").tobytes())
    assert digest(ADAPTER) == digest(dict(reversed(ADAPTER.items()))) == expected.hexdigest()


def test_digest_changes_with_one_bit():
    changed = ADAPTER | {"b.R": torch.nextafter(ADAPTER["b.R"], torch.tensor(9.0))}
    assert digest(changed) != digest(ADAPTER)

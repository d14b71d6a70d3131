"""The payload: an adapter packed into one flat float32 array, with the layout that both sides must agree on.

The overhead of a message grows with its number of arrays, not with their size, so all factors are sent as one.
"""

import hashlib
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedsim.types import Adapter


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the factors in a flat array, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, adapter: Adapter) -> "Layout":
        """Returns the layout of an adapter without a client axis."""
        return cls(tuple(adapter), tuple(tuple(tensor.shape) for tensor in adapter.values()))

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each factor."""
        return [prod(shape) for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        """Number of elements in all."""
        return sum(self.sizes)

    def pack(self, adapter: Adapter) -> Tensor:
        """Returns the factors as one float32 array [num_parameters], in the order of the layout, not of the adapter.

        Raises ValueError if names or shapes differ from the layout.
        """
        self._check(adapter)
        with torch.no_grad():
            return torch.cat([adapter[name].flatten() for name in self.names]).to(torch.float32)

    def pack_on_cpu(self, adapter: Adapter) -> Tensor:
        """Returns the same on the CPU, copied factor by factor: a GPU that they half fill cannot hold all of them twice."""
        self._check(adapter)
        flat = torch.empty(self.num_parameters)
        for name, part in self.unpack(flat).items():
            part.copy_(adapter[name])
        return flat

    def _check(self, adapter: Adapter) -> None:
        if {name: tuple(tensor.shape) for name, tensor in adapter.items()} != dict(zip(self.names, self.shapes, strict=True)):
            raise ValueError(f"Expected the factors {self.names[:2]}... of this layout, got {tuple(adapter)[:2]}...")

    def unpack(self, flat: Tensor) -> Adapter:
        """Returns the factors of [num_parameters], or stacked ones [clients, ...] of [clients, num_parameters], as views."""
        parts = flat.split(self.sizes, dim=-1)
        return {name: part.view(*flat.shape[:-1], *shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}


def digest(adapter: Adapter) -> str:
    """Returns the SHA-256, in hex, over names, shapes and float32 little-endian values in the order of names."""
    total = hashlib.sha256()
    for name in sorted(adapter):
        tensor = adapter[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        total.update(tensor.numpy().astype("<f4", copy=False).data)
    return total.hexdigest()

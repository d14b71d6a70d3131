"""How clients send the gradient of each adapted weight, from which the bases are computed: as the whole matrix or as a sketch.

The sketch of G [out, in] is G Omega and Psi G, with random Omega [in, a] and Psi [b, out] that are the same for all clients. It is linear:
sums of sketches are the sketch of the sum, so averaging, masks and noise work as on G itself. Least squares recovers the largest directions
of G (Tropp, Yurtsever, Udell and Cevher 2017, Practical sketching algorithms for low-rank matrix approximation, doi 10.1137/17M1111590).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.core.forms import AdapterSpec
from fedsim.core.payload import Layout
from fedsim.errors import UserError
from fedsim.seeding import torch_generator
from fedsim.types import Adapter

WIDER, SPARE = 1.5, 8
"""The narrower half of a sketch has WIDER x rank + SPARE columns, the other one twice as many."""


@dataclass(frozen=True)
class Sketch:
    """The sketch of matrices [out, in]: `columns` combinations of their columns and `rows` of their rows.

    Its expected squared norm over Omega and Psi is that of the matrix, so a clip norm means the same for both.
    """

    shape: tuple[int, int]
    columns: int
    rows: int
    seed: int
    _mixed: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, shape: tuple[int, int], rank: int, seed: int) -> "Sketch":
        """Returns the sketch that recovers `rank` directions; its narrower half lies along the longer side."""
        narrow = int(WIDER * rank) + SPARE
        columns, rows = (narrow, 2 * narrow) if shape[0] >= shape[1] else (2 * narrow, narrow)
        return cls(shape, columns, rows, seed)

    @property
    def num_parameters(self) -> int:
        """Number of elements of a sketch."""
        return self.shape[0] * self.columns + self.rows * self.shape[1]

    def mixing(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns Omega [in, columns] and Psi [rows, out], float32, the same for every layer of one shape."""
        if device not in self._mixed:
            generator = torch_generator(self.seed, "sketch", *self.shape)
            omega = torch.randn(self.shape[1], self.columns, generator=generator) / (2 * self.columns) ** 0.5
            psi = torch.randn(self.rows, self.shape[0], generator=generator) / (2 * self.rows) ** 0.5
            self._mixed[device] = omega.to(device), psi.to(device)
        return self._mixed[device]

    def whole(self, mixed_columns: Tensor, mixed_rows: Tensor) -> Tensor:
        """Returns the matrix [out, in] recovered from a sketch, float64 on the CPU, of the rank of its narrower half."""
        omega, psi = (matrix.double() for matrix in self.mixing(torch.device("cpu")))
        y, w = mixed_columns.double().cpu(), mixed_rows.double().cpu()
        if self.columns > self.rows:  # the narrower half spans the rows
            return _from_halves(w.T, y.T, omega.T).T
        return _from_halves(y, w, psi)


def _from_halves(narrow: Tensor, wide: Tensor, psi: Tensor) -> Tensor:
    """Returns Q X: Q an orthonormal basis of G Omega's columns (`narrow`), X the least-squares solution of psi Q X = psi G (`wide`)."""
    basis = torch.linalg.qr(narrow).Q
    left, right = torch.linalg.qr(psi @ basis)  # psi Q has twice as many rows as columns, and full rank for any G
    return basis @ torch.linalg.solve_triangular(right, left.T @ wide, upper=True)


@dataclass(frozen=True)
class GradientParts:
    """The parts in which the gradients of layers {name: (out, in)} are sent: the two halves of a sketch, {name}.columns and {name}.rows,
    or the whole matrix, {name}."""

    layers: Mapping[str, tuple[int, int]]
    sketches: Mapping[str, Sketch]

    @cached_property
    def layout(self) -> Layout:
        """Layout of all parts, as one flat array."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in self.layers.items():
            if sketch := self.sketches.get(name):
                shapes |= {f"{name}.columns": (rows, sketch.columns), f"{name}.rows": (sketch.rows, columns)}
            else:
                shapes[name] = (rows, columns)
        return Layout(tuple(shapes), tuple(shapes.values()))

    def factored(self, name: str, deltas: Tensor, inputs: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields (part, [..., p], [..., q]) for a layer's gradient, the sum over tokens of deltas^T inputs, [..., out] and [..., in].

        The part is the same sum over the yielded pair, [p, q]; the gradient itself is not formed. Mixed tensors are float32, others keep
        their type.
        """
        if name not in self.sketches:
            yield name, deltas, inputs
            return
        omega, psi = self.sketches[name].mixing(deltas.device)
        yield f"{name}.columns", deltas, inputs.float() @ omega
        yield f"{name}.rows", deltas.float() @ psi.T, inputs

    def whole(self, parts: Adapter, name: str) -> Tensor:
        """Returns a layer's gradient [out, in], or what its sketch recovers of it."""
        if name not in self.sketches:
            return parts[name]
        return self.sketches[name].whole(parts[f"{name}.columns"], parts[f"{name}.rows"])


WHOLE = GradientParts({}, {})
"""Sketches no layer."""


def parts_of(config: Config, spec: AdapterSpec) -> GradientParts:
    """Returns the parts for the bases of `spec`: with `adapter.sketch`, layers whose sketch is at most half as large are sketched.

    Raises UserError if there is no such layer.
    """
    if not config.adapter.sketch:
        return GradientParts(spec.layers, {})
    found = {shape: Sketch.of(shape, spec.rank, config.seed) for shape in spec.layers.values()}
    small = {shape: sketch for shape, sketch in found.items() if 2 * sketch.num_parameters <= shape[0] * shape[1]}
    if not small:
        raise UserError(
            f"adapter.sketch: at rank {spec.rank} no layer's sketch is half as large as its gradient; take a lower rank, or leave it out."
        )
    return GradientParts(spec.layers, {name: small[shape] for name, shape in spec.layers.items() if shape in small})

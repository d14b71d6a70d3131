"""The forms of adapters: the factors of one layer, their shapes, and the matrices whose product is the weight update.

A method trains some kinds of factors of one form. Everything else about a form follows from its chain of matrices: the layer multiplies
by them from right to left, the dense update is their product, and a client of smaller rank holds the leading rows and columns of each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from fedsim.core.payload import Layout
from fedsim.types import Adapter

Factors = dict[str, Tensor]
"""The factors of one layer by kind; a leading axis holds one per group of rows."""

HEAD = "head"
"""Kind of the factor of a classification head's layer: [W | b] as one dense matrix [out, in + 1]. Every method trains and averages it."""


@dataclass(frozen=True)
class Form:
    """A parametrisation of the update of a layer W [out, in]."""

    name: str
    shapes: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]  # of (out, in, rank, heads)
    chain: Callable[[Factors], list[Tensor]]  # matrices from left to right; their product, times the scaling, is the update
    rank_axes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by kind, the axes that a smaller rank truncates
    low_rank: bool = True  # has a scaling and a rank; rank x heads is at most the smaller side of a layer

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of factors of an adapted layer."""
        return tuple(self.shapes(1, 1, 1, 1))


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Returns [..., h r, h r] of [..., h, r, r]."""
    heads, rank = blocks.shape[-3], blocks.shape[-1]
    spread = blocks.unsqueeze(-2) * torch.eye(heads, dtype=blocks.dtype, device=blocks.device).view(heads, 1, heads, 1)
    return spread.reshape(*blocks.shape[:-3], heads * rank, heads * rank)


LORA_SB = Form(
    name="lora_sb",
    shapes=lambda m, n, r, h: {"B": (m, r), "R": (r, r), "A": (r, n)},
    chain=lambda f: [f["B"], f["R"], f["A"]],
    rank_axes={"B": (1,), "R": (0, 1), "A": (0,)},
)
LORA = Form(
    name="lora",
    shapes=lambda m, n, r, h: {"B": (m, r), "A": (r, n)},
    chain=lambda f: [f["B"], f["A"]],
    rank_axes={"B": (1,), "A": (0,)},
)
RAVAN = Form(
    name="ravan",
    shapes=lambda m, n, r, h: {"B": (m, h * r), "H": (h, r, r), "s": (h,), "A": (h * r, n)},
    chain=lambda f: [f["B"], _block_diagonal(f["s"][..., None, None] * f["H"]), f["A"]],
)
DENSE = Form(
    name="dense",
    shapes=lambda m, n, r, h: {"D": (m, n)},
    chain=lambda f: [f["D"]],
    low_rank=False,
)


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a whole model, described by shapes alone, which is all that the server side needs."""

    form: Form
    layers: dict[str, tuple[int, int]]  # path to (out, in), in the model's order
    rank: int
    heads: int = 1
    scaling: float = 1.0
    head: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the layers of a classification head, as in `layers`
    _layouts: dict[tuple[str, ...], Layout] = field(default_factory=dict, init=False, repr=False, compare=False)  # cache by kinds

    def shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of an adapted layer's factors by kind."""
        return self.form.shapes(*self.layers[layer], self.rank, self.heads)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of factors: the form's, and the head's if there is one."""
        return (*self.form.kinds, *((HEAD,) if self.head else ()))

    def _factors(self, kinds: Sequence[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yields layer, kind and shape of each factor of the given kinds, in the model's order, with those of the head last."""
        for layer in self.layers:
            shapes = self.shapes(layer)
            yield from ((layer, kind, shapes[kind]) for kind in kinds if kind != HEAD)
        if HEAD in kinds:
            yield from ((layer, HEAD, (rows, columns + 1)) for layer, (rows, columns) in self.head.items())

    def layout(self, kinds: Sequence[str]) -> Layout:
        """Returns the layout of the factors of the given kinds, in the model's order, with those of the head last."""
        key = tuple(kinds)
        if key not in self._layouts:
            shapes = {f"{layer}.{kind}": shape for layer, kind, shape in self._factors(kinds)}
            self._layouts[key] = Layout(tuple(shapes), tuple(shapes.values()))
        return self._layouts[key]

    def num_parameters(self, kinds: Sequence[str], rank: int | None = None) -> int:
        """Returns the number of elements of the given kinds in all layers, for a client of this rank (None is the adapter's rank)."""
        held = replace(self, rank=min(rank or self.rank, self.rank))
        return sum(prod(shape) for _, _, shape in held._factors(kinds))

    def pick(self, adapter: Adapter, kinds: Sequence[str]) -> Adapter:
        """Returns the factors of the given kinds, in the model's order."""
        return {name: adapter[name] for name in self.layout(kinds).names}

    def pack(self, adapter: Adapter, kinds: Sequence[str]) -> Tensor:
        """Returns the factors of the given kinds as one flat float32 array."""
        return self.layout(kinds).pack(self.pick(adapter, kinds))

    def factors(self, adapter: Adapter, layer: str) -> Factors:
        """Returns the factors of one adapted layer by kind."""
        return {kind: adapter[f"{layer}.{kind}"] for kind in self.form.kinds}

    def update(self, adapter: Adapter, layer: str) -> Tensor:
        """Returns the dense weight update [out, in] of one layer, scaling included."""
        return product(self.form, self.factors(adapter, layer), self.scaling)

    def block(self, kinds: Sequence[str], rank: int) -> Tensor | None:
        """Returns the positions, in the flat array of `kinds`, of the entries that a client of this rank holds; None for all."""
        if rank >= self.rank:
            return None
        return self._positions(kinds, lambda kind: tuple(slice(rank if axis in self._axes(kind) else None) for axis in range(3)))

    def head_positions(self, kinds: Sequence[str], heads: Sequence[int]) -> Tensor | None:
        """Returns the positions, in the flat array of `kinds`, of the factors of RAVAN's given heads; None for all heads.

        A classification head is always included.
        """
        if len(heads) >= self.heads:
            return None
        return self._positions(kinds, lambda kind: (slice(None),) if kind == HEAD else (list(heads),))

    def within(self, kinds: Sequence[str], some: Sequence[str]) -> Tensor:
        """Returns the positions of the kinds `some` in the flat array of `kinds`."""
        return self._positions(kinds, lambda kind: (slice(None),) if kind in some else (slice(0),))

    def _axes(self, kind: str) -> tuple[int, ...]:
        return self.form.rank_axes.get(kind, ())

    def _positions(self, kinds: Sequence[str], index: Callable[[str], tuple[slice | list[int], ...]]) -> Tensor:
        masks = []
        for _, kind, shape in self._factors(kinds):
            mask = torch.zeros(shape, dtype=torch.bool)
            mask[index(kind)[: mask.dim()]] = True
            masks.append(mask.flatten())
        return torch.cat(masks).nonzero().squeeze(1)


def product(form: Form, factors: Factors, scaling: float) -> Tensor:
    """Returns the dense weight update of one layer, [out, in]."""
    return scaling * reduce(torch.matmul, form.chain(factors))

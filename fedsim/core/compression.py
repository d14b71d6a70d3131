"""Compressed uploads: a client's update as a few small arrays, whose sizes follow from the number of parameters alone.

Rounding is stochastic and therefore unbiased: the clients' errors average out over many clients (QSGD, arXiv 1610.02132). Integers share
one scale per block of 256 values, across factors (arXiv 2110.02861): an outlier coarsens its block and not its whole factor, and neither
side needs the factors' sizes. That costs 1/64 byte a value. `top_k` is biased; error feedback, which adds what was left out to the next
update, compensates for it (arXiv 1809.07599, 1901.09847).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

BLOCK = 256  # values that share a scale
LARGEST = 2.0**127  # above it, rounding up could overflow float32
SMALLEST_SCALE = 2.0**-126  # the least normal float32; a block of zeros has this scale

Arrays = dict[str, Tensor]
"""The arrays sent, by name, on the CPU, with the types and shapes in which they are serialised."""

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each of these arrays."""


@dataclass(frozen=True)
class Codec:
    """Encodes an update in fewer bytes, and decodes it.

    `density` is the fraction of entries that `top_k` keeps, which both sides must know; the other codecs ignore it.
    """

    name: str
    _shapes: Callable[[int, float], Shapes]
    _encode: Callable[[Tensor, Generator, float], Arrays]
    _decode: Callable[[Arrays, int], Tensor]

    def shapes(self, num_parameters: int, density: float = 1.0) -> Shapes:
        """Returns type and shape of every array. Raises ValueError unless 1 <= num_parameters < 2**31 and 0 < density <= 1."""
        if not 1 <= num_parameters < 2**31:
            raise ValueError(f"Expected a number of parameters from 1 to 2**31 - 1, got {num_parameters}.")
        if not 0 < density <= 1:
            raise ValueError(f"Expected 0 < density <= 1, got {density}.")
        return self._shapes(num_parameters, density)

    def num_bytes(self, num_parameters: int, density: float = 1.0) -> int:
        """Returns the bytes of all arrays together, as held in memory. Raises as `shapes` does."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.shapes(num_parameters, density).values())

    def encode(self, flat: Tensor, generator: Generator, density: float = 1.0) -> Arrays:
        """Returns the arrays of `flat`, float32 [parameters] on the CPU, with the types and shapes of `shapes`.

        Guarantees: `flat` is not changed; the same `flat` and state of the generator give the same arrays; zeros, and values already on
        the codec's grid, are kept exactly. Raises ValueError for another type or shape, no values, NaN and magnitudes above 2**127.
        """
        flat = flat.detach()
        if flat.dtype != torch.float32 or flat.dim() != 1:
            raise ValueError(f"Expected float32 of one dimension, got {flat.dtype} of shape {tuple(flat.shape)}.")
        self.shapes(flat.numel(), density)  # checks size and density
        if not (flat.abs() <= LARGEST).all():
            raise ValueError("Expected finite values of magnitude at most 2**127, got NaN, infinity or a larger one; did training diverge?")
        return self._encode(flat, generator, density)

    def decode(self, arrays: Arrays, num_parameters: int, density: float = 1.0) -> Tensor:
        """Returns the update as finite float32 [num_parameters]; `density` is that of `encode`.

        `arrays` are not trusted. Raises ValueError for names, types or shapes other than those of `shapes`, and for contents that no
        `encode` writes: NaN or infinity, scales not above zero, levels off the grid, indices out of range, repeated or out of order.
        """
        expected = self.shapes(num_parameters, density)
        found = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        if found != expected:
            raise ValueError(f"Expected the arrays {expected} of codec {self.name!r}, got {found!s:.200}.")
        flat = self._decode(arrays, num_parameters)
        if not flat.isfinite().all():
            raise ValueError(f"Expected finite values from codec {self.name!r}, got NaN or infinity.")
        return flat


class CompressedUpload(NamedTuple):
    """A compressed update: the arrays sent, what the server decodes from them, and the rest for the next round."""

    arrays: Arrays
    decoded: Tensor  # [parameters]
    residual: Tensor | None  # [parameters]; None without error feedback


def compress(update: Tensor, residual: Tensor | None, codec: Codec, generator: Generator, density: float = 1.0) -> CompressedUpload:
    """Encodes update + residual; the new residual is this sum minus the decoded values.

    Guarantees: the decoded values of all rounds and the last residual add up to the updates, to float32 tolerance. The first round
    starts from a residual of zeros; None means no error feedback, and stays None.
    Raises ValueError as `Codec.encode` does, and for a residual of another type or shape.
    """
    if residual is not None and (residual.dtype, residual.shape) != (update.dtype, update.shape):
        raise ValueError(f"Expected a residual like the update {tuple(update.shape)}, got {residual.dtype} {tuple(residual.shape)}.")
    total = update if residual is None else update + residual
    arrays = codec.encode(total, generator, density)
    decoded = codec.decode(arrays, total.numel(), density)
    return CompressedUpload(arrays, decoded, None if residual is None else total - decoded)


def _bfloat16_shapes(num_parameters: int, density: float) -> Shapes:
    return {"bits": (torch.uint16, (num_parameters,))}


def _encode_bfloat16(flat: Tensor, generator: Generator, density: float) -> Arrays:
    """Adds a random number to the lower half of each float32: it carries into the upper half, a bfloat16, with the right probability."""
    random = torch.randint(2**16, flat.shape, generator=generator, dtype=torch.int32)
    upper = (flat.view(torch.int32) + random) >> 16
    return {"bits": upper.to(torch.int16).view(torch.uint16)}


def _decode_bfloat16(arrays: Arrays, num_parameters: int) -> Tensor:
    return arrays["bits"].view(torch.bfloat16).to(torch.float32)


def _integer_shapes(num_codes: int, num_parameters: int) -> Shapes:
    return {"codes": (torch.uint8, (num_codes,)), "scales": (torch.float32, (ceil(num_parameters / BLOCK),))}


def _quantize(flat: Tensor, generator: Generator, limit: int) -> tuple[Tensor, Tensor]:
    """Returns codes, level + limit + 1 as uint8 [parameters], and scales [blocks]; levels run from -limit to limit."""
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = _scales(blocks, limit)
    ratios = blocks / scales.unsqueeze(1)
    low = ratios.abs().floor()
    up = torch.rand(ratios.shape, generator=generator) < ratios.abs() - low
    levels = (low + up).copysign_(ratios)
    return (levels + (limit + 1)).to(torch.uint8).flatten()[: flat.numel()], scales


def _scales(blocks: Tensor, limit: int) -> Tensor:
    """Returns the step of each block's grid.

    It is rounded up to 17 significant bits, so that no value lies beyond the last level and level * scale is exact in float32.
    """
    steps = (blocks.abs().amax(dim=1) / limit).clamp_(min=SMALLEST_SCALE)
    return ((steps.view(torch.int32) + 0x7F) & ~0x7F).view(torch.float32)


def _dequantize(codes: Tensor, scales: Tensor, limit: int) -> Tensor:
    """Returns float32 [parameters]. Raises ValueError for levels outside -limit..limit and scales that are not above zero."""
    levels = codes.to(torch.float32) - (limit + 1)
    if not (levels.abs() <= limit).all():
        raise ValueError(f"Expected levels from -{limit} to {limit}, got {levels.min():.0f} to {levels.max():.0f}.")
    if not (scales > 0).all():
        raise ValueError(f"Expected scales above 0, got {scales.min():g}.")
    return levels * scales.repeat_interleave(BLOCK)[: levels.numel()]


def _int8_shapes(num_parameters: int, density: float) -> Shapes:
    return _integer_shapes(num_parameters, num_parameters)


def _encode_int8(flat: Tensor, generator: Generator, density: float) -> Arrays:
    codes, scales = _quantize(flat, generator, 127)
    return {"codes": codes, "scales": scales}


def _decode_int8(arrays: Arrays, num_parameters: int) -> Tensor:
    return _dequantize(arrays["codes"], arrays["scales"], 127)


def _int4_shapes(num_parameters: int, density: float) -> Shapes:
    return _integer_shapes(ceil(num_parameters / 2), num_parameters)


def _encode_int4(flat: Tensor, generator: Generator, density: float) -> Arrays:
    """Packs two values per byte, the first into the lower half; an odd last one is paired with a zero."""
    codes, scales = _quantize(flat, generator, 7)
    pairs = functional.pad(codes, (0, codes.numel() % 2), value=8).view(-1, 2)
    return {"codes": pairs[:, 0] | (pairs[:, 1] << 4), "scales": scales}


def _decode_int4(arrays: Arrays, num_parameters: int) -> Tensor:
    packed = arrays["codes"]
    codes = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten()
    return _dequantize(codes[:num_parameters], arrays["scales"], 7)


def _top_k_shapes(num_parameters: int, density: float) -> Shapes:
    count = max(1, round(density * num_parameters))
    return {"indices": (torch.int32, (count,)), "values": (torch.float32, (count,))}


def _encode_top_k(flat: Tensor, generator: Generator, density: float) -> Arrays:
    """Prefers earlier entries of equal magnitude, so that the choice does not depend on how a machine sorts."""
    _, (count,) = _top_k_shapes(flat.numel(), density)["indices"]
    magnitudes = flat.abs()
    threshold = magnitudes.topk(count, sorted=False).values.min()
    kept = magnitudes > threshold
    kept[(magnitudes == threshold).nonzero().flatten()[: count - int(kept.sum())]] = True
    indices = kept.nonzero().flatten()
    return {"indices": indices.to(torch.int32), "values": flat[indices]}


def _decode_top_k(arrays: Arrays, num_parameters: int) -> Tensor:
    indices = arrays["indices"].to(torch.int64)
    if indices.min() < 0 or indices.max() >= num_parameters:
        raise ValueError(f"Expected indices from 0 to {num_parameters - 1}, got {indices.min()} to {indices.max()}.")
    if not (indices.diff() > 0).all():
        raise ValueError("Expected indices in ascending order, each once, got another order or a repeated one.")
    return torch.zeros(num_parameters).index_copy_(0, indices, arrays["values"])


BFLOAT16 = Codec("bfloat16", _bfloat16_shapes, _encode_bfloat16, _decode_bfloat16)
INT8 = Codec("int8", _int8_shapes, _encode_int8, _decode_int8)
INT4 = Codec("int4", _int4_shapes, _encode_int4, _decode_int4)
TOP_K = Codec("top_k", _top_k_shapes, _encode_top_k, _decode_top_k)

CODECS: dict[str, Codec] = {codec.name: codec for codec in (BFLOAT16, INT8, INT4, TOP_K)}

"""Section m: fedsim's library for matrix products on this CPU against PyTorch's own choice."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.suite import Case, Column, Found, Section, Settings, SkippedError
from experiments.benchmarks.timing import Task, interleaved, medians, ratio
from fedsim.core import gemm

SHAPES = ((192, 192), (512, 192), (512, 1376), (2272, 192))
"""(out, in) of layers of the embedded model, of the one with 20 M parameters, and of a head."""


def cases(settings: Settings) -> list[Case]:
    """Returns tokens, out and in of every row."""
    shapes = SHAPES[2:3] if settings.quick else SHAPES
    return [{"tokens": tokens, "out": rows, "in": columns} for rows, columns in shapes for tokens in (32, 1024)]


def measure(case: Case, settings: Settings) -> Found:
    """Measures a layer's forward product, and the backward one with the same matrix transposed."""
    if not gemm.has_onednn():
        raise SkippedError("PyTorch's own library is taken here: the processor has no AVX-512, or oneDNN is missing.")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(case["tokens"], width, generator=generator) for width in (case["in"], case["out"]))
    matrix = torch.randn(case["out"], case["in"], generator=generator)
    flops = 4.0 * matrix.numel() * case["tokens"]
    times = max(1, int(5e9 / flops))

    def task(linear: Callable[[Tensor, Tensor], Tensor]) -> Task:
        def run() -> float:
            for _ in range(times):
                linear(x, matrix)
                linear(y, matrix.T)
            return times * flops / 1e9

        return run

    rates = interleaved({"own": task(functional.linear), "chosen": task(gemm.linear)}, turns=settings.turns, seconds=settings.seconds)
    return medians(rates) | {"ratio": ratio(rates, "chosen", "own")}


SECTION = Section(
    "m",
    "Matrix products",
    "GFLOP/s of a frozen layer's two products, forward and backward, in float32 on the CPU: with oneDNN, which fedsim uses if the "
    "processor has AVX-512, and with MKL, PyTorch's default.",
    (
        Column("tokens", "tokens", "{:,}"),
        Column("out", "out", "{:,}"),
        Column("in", "in", "{:,}"),
        Column("oneDNN", "chosen", "{:.0f}"),
        Column("PyTorch's own", "own", "{:.0f}"),
        Column("x", "ratio", "{:.2f}"),
    ),
    cases,
    measure,
)

"""Section t: how much torch.compile speeds up the passes of a cohort, and how long it compiles; on a GPU with CUDA graphs as well.

fedsim does not compile its passes: the table shows why.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from experiments.benchmarks import workloads
from experiments.benchmarks.accelerator import device_of, subject_of, workload_of
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import interleaved, medians, ratio
from experiments.benchmarks.workloads import Workload
from fedsim.core import gemm

WAYS: dict[str, dict[str, Any]] = {
    "this shape": {"dynamic": False},
    "any shape": {"dynamic": True},
    "CUDA graphs": {"dynamic": False, "mode": "reduce-overhead"},
}
CLIENTS = 25


def cases(settings: Settings) -> list[Case]:
    """Returns model and way of every row."""
    if device_of(settings).type == "cuda":
        return [{"model": "llama32_1b", "way": way} for way in WAYS]
    return [{"model": "embedded", "way": way} for way in list(WAYS)[: 1 if settings.quick else 2]]


def measure(case: Case, settings: Settings) -> Found:
    """Measures passes of one shape in turns with and without compilation, and the seconds of the first compiled step."""
    device = device_of(settings)
    on_gpu = device.type == "cuda"
    workload = workload_of(case["model"], CLIENTS, 2) if on_gpu else Workload(case["model"], CLIENTS, batch=1, tokens=32, steps=2)
    on = subject_of(case["model"], str(device), False) if on_gpu else workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)
    compiled = torch.compile(on.model.forward, **WAYS[case["way"]])

    def train(fast: bool) -> float:
        with _forward(on.model, compiled if fast else on.model.forward):
            return float(workloads.train(on, clients, workload.training))

    with _own_products():
        begun = time.perf_counter()
        train(True)
        first = time.perf_counter() - begun
        rates = interleaved(
            {"eager": lambda: train(False), "compiled": lambda: train(True)}, turns=settings.turns, seconds=settings.seconds
        )
    chosen = interleaved({"fedsim": lambda: train(False)}, turns=min(5, settings.turns))
    return {"first_seconds": first, "ratio": ratio(rates, "compiled", "eager"), **medians(rates), **medians(chosen)}


@contextmanager
def _forward(model: nn.Module, forward: object) -> Iterator[None]:
    model.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.forward


@contextmanager
def _own_products() -> Iterator[None]:
    """Multiplies with PyTorch's own library in the block, for which torch.compile generates code."""
    before = gemm.has_onednn
    gemm.has_onednn = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        gemm.has_onednn = before


SECTION = Section(
    "t",
    "torch.compile",
    "Tokens per second of a cohort of 25 clients whose passes all have one shape. Code compiled for *this shape* is recompiled "
    "whenever the number of rows or tokens changes, which is in nearly every pass over real data; for *any shape*, once. *seconds*: of "
    "the first compiled step. On a CPU both use PyTorch's own matrix products, for which code is compiled; *fedsim* is the uncompiled "
    "rate with the library of section m.",
    (
        Column("model", "model"),
        Column("compiled for", "way"),
        Column("eager", "eager", "{:,.0f}"),
        Column("compiled", "compiled", "{:,.0f}"),
        Column("x", "ratio", "{:.2f}"),
        Column("seconds", "first_seconds", "{:.0f}"),
        Column("fedsim", "fedsim", "{:,.0f}"),
    ),
    cases,
    measure,
)

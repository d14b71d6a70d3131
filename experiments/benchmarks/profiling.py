"""Section p: where the time of local training goes, by kind of operator."""

from collections import defaultdict

import torch

from experiments.benchmarks import workloads
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.training import TOKENS
from experiments.benchmarks.workloads import Workload

KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention", "_efficient_attention"),
    "log-softmax of the logits": ("log_softmax", "nll_loss", "cross_entropy"),
    "copies": ("copy_", "cat", "clone", "contiguous", "_to_copy", "stack", "index", "gather"),
    "optimizer and sums": ("lerp", "addcmul", "addcdiv", "sqrt", "index_add", "zero_", "fill_"),
    "other elementwise": ("",),
}
"""An operator is of the first kind with one of its words in the operator's name."""


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients and batch of every row."""
    grid = (
        [("embedded", 25, 1)] if settings.quick else [("embedded", 25, 1), ("embedded", 25, 4), ("embedded", 1000, 1), ("llama_20m", 25, 4)]
    )
    return [{"model": model, "clients": clients, "batch": batch} for model, clients, batch in grid]


def measure(case: Case, settings: Settings) -> Found:
    """Returns the share of each kind in the time of two steps of a cohort, in percent, and what Python takes between operators."""
    workload = Workload(**case, tokens=TOKENS[case["batch"]], steps=2, rank=64)
    on = workloads.subject(workload.model, workload.rank)
    clients = workload.all_clients(on.vocabulary)
    workloads.train(on, clients, workload.training)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.profiler.record_function("everything"):
        workloads.train(on, clients, workload.training)
    return shares({event.key: float(event.self_cpu_time_total) for event in profile.key_averages()})


def shares(times: dict[str, float]) -> Found:
    """Returns the operators' own times by kind, in percent; "everything" is the time outside of them, in Python."""
    sums: dict[str, float] = defaultdict(float)
    for name, own in times.items():
        sums[_kind(name)] += own
    total = sum(sums.values())
    ops = sorted(((own, name) for name, own in times.items() if name != "everything"), reverse=True)[:4]
    return {kind: 100 * value / total for kind, value in sums.items()} | {
        "largest": ", ".join(f"{name.removeprefix('aten::')} {100 * own / total:.0f} %" for own, name in ops)
    }


def _kind(name: str) -> str:
    if name == "everything" or name.startswith("_Affine"):  # an autograd function written in Python
        return "Python"
    parts = name.lower().removeprefix("aten::")
    for kind, words in KINDS.items():
        if any(word in parts for word in words) and not (kind == "matrix products" and "comm" in parts):
            return kind
    return "other elementwise"


SECTION = Section(
    "p",
    "Where the time goes",
    "Percent of the time of a cohort's local training at rank 64, by torch's profiler (own time of operators; the "
    "profiler itself makes many small operators "
    "look slower). *Python*: everything between operators.",
    (
        Column("model", "model"),
        Column("clients", "clients", "{:,}"),
        Column("batch", "batch"),
        *(Column(kind, kind, "{:.0f}") for kind in KINDS),
        Column("Python", "Python", "{:.0f}"),
        Column("largest operators", "largest"),
    ),
    cases,
    measure,
)

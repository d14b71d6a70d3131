"""Section g: models of published size on a GPU, with random weights built on the device from their configuration.

Model FLOPs are 4 x parameters x tokens: a frozen base costs a forward pass and the gradient of the activations, no gradient of weights.
They are compared with the highest throughput of matrix products, measured on the same device in the same run. Several GPUs run one worker
each, with a share of the clients. On a CPU the section runs a tiny model, as a test; its figures mean nothing.
"""

import gc
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from experiments.benchmarks import workloads
from experiments.benchmarks.processes import answer, asked, call
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.timing import Task, interleaved, medians, ratio
from experiments.benchmarks.workloads import ARCHITECTURES, Subject, Workload
from fedsim.calibration import product_flops
from fedsim.choices import Dtype
from fedsim.cli.groups import choice_values
from fedsim.config import ModelConfig
from fedsim.memory import resident_bytes
from fedsim.shapes import random_model

PUBLISHED = {"llama32_1b": (256, 8), "llama32_3b": (256, 8), "mistral_7b": (512, 1)}
"""(tokens of a sequence, batch of a client) by model, as published (arXiv 2502.15436)."""

RANK = {"tiny": 16}
BYTES_NEEDED = {"llama32_1b": 12e9, "llama32_3b": 24e9, "mistral_7b": 44e9}
"""Device memory below which a model is left out."""


def device_of(settings: Settings) -> torch.device:
    """Returns the device to measure."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients and way of training of every row; on a CPU only the tiny model, unless models are named."""
    device = device_of(settings)
    fitting = [name for name, needed in BYTES_NEEDED.items() if device.type == "cuda" and _memory(device) >= needed]
    models = settings.models or tuple(fitting) or ("tiny",)
    counts = (1, 5) if settings.quick else (1, 5, 25)
    rows = [{"model": model, "clients": clients, "way": "plain"} for model in models for clients in counts]
    rows += [{"model": model, "clients": counts[-1], "way": way} for model in models for way in ("checkpointing", "DP-SGD")]
    workers = torch.cuda.device_count() if device.type == "cuda" else (2 if settings.models else 1)
    if workers > 1:
        rows += [{"model": model, "clients": counts[-1], "way": f"{workers} workers"} for model in models]
    return rows


def _memory(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory)


def measure(case: Case, settings: Settings) -> Found:
    """Measures one row: the cohort and, for plain training, the same clients one by one and centralised."""
    if case["way"].endswith("workers"):
        return _workers(case, settings)
    device, workload = device_of(settings), workload_of(case["model"], case["clients"], 1 if settings.quick else 2)
    on = subject_of(case["model"], str(device), case["way"] == "checkpointing")
    clients = workload.all_clients(on.vocabulary)
    noise = 1.0 if case["way"] == "DP-SGD" else None
    _reset(device)
    workloads.train(on, clients, workload.training, noise)
    found: Found = {"peak_gb": _peak(device) / 1e9}
    rates = interleaved(_tasks(case, on, workload, clients, noise, device), turns=settings.turns, seconds=settings.seconds / 4)
    middle = medians(rates)
    ceiling = matrix_product_ceiling(str(device), next(on.model.parameters()).dtype)
    flops = 4.0 * parameters(on.model) * middle["cohort"]
    found |= {"tokens": workload.tokens, "batch": workload.batch, "cohort": middle["cohort"], "tflops": flops / 1e12}
    found |= {"ceiling_tflops": ceiling / 1e12, "utilisation": 100 * flops / ceiling}
    found |= {f"ratio_{name}": ratio(rates, "cohort", name) for name in ("one by one", "centralised") if name in rates}
    return found


def _tasks(
    case: Case, on: Subject, workload: Workload, clients: Sequence[Any], noise: float | None, device: torch.device
) -> dict[str, Task]:
    from experiments.benchmarks.peers import centralised

    tasks: dict[str, Task] = {"cohort": lambda: workloads.train(on, clients, workload.training, noise)}
    if case["way"] == "plain":
        tasks["one by one"] = lambda: workloads.train_one_by_one(on, clients[:5], workload.training)
        tasks["centralised"] = lambda: centralised.train(on, clients, workload.training)
    return {name: lambda task=task: _synchronised(task, device) for name, task in tasks.items()}  # type: ignore[misc]


def workload_of(model: str, clients: int, steps: int) -> Workload:
    """Returns the workload of a model at its published length and batch, at rank 200."""
    tokens, batch = PUBLISHED.get(model, (64, 1))
    return Workload(model, clients, batch, tokens, steps, RANK.get(model, 200))


def _synchronised(task: Task, device: torch.device) -> float:
    amount = task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return amount


@lru_cache(maxsize=1)
def subject_of(model: str, device: str, checkpointing: bool) -> Subject:
    on = torch.device(device)
    entries = ARCHITECTURES.get(model) or choice_values("model", model)["architecture"]
    config = ModelConfig(architecture=dict(entries), dtype=Dtype.bfloat16 if on.type == "cuda" else Dtype.float32)
    built = random_model(config, on, activation_checkpointing=checkpointing)
    return workloads.adapted(built, workload_of(model, 1, 1).rank)


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters that multiply every token: all but an embedding that is not also the head."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    tied = model.get_output_embeddings().weight is embedding  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters()) - (0 if tied else embedding.numel())


@lru_cache
def matrix_product_ceiling(device: str, dtype: torch.dtype) -> float:
    """Returns the highest FLOP/s of square matrix products over a few sizes."""
    sizes = (4096, 8192, 16384) if device.startswith("cuda") else (512, 1024)
    return max(product_flops(size, size, torch.device(device), dtype, tokens=size) for size in sizes)


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Returns the peak memory in bytes: allocated on a GPU, resident on a CPU (over the whole process)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resident_bytes(peak=True))


def _workers(case: Case, settings: Settings) -> Found:
    """Measures one process per device, each with its share of the clients, at the same time; the slowest counts.

    This process frees its memory first, which the first GPU's worker would lack.
    """
    count, device = int(case["way"].split()[0]), device_of(settings)
    subject_of.cache_clear()
    _reset(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == count else [str(place) for place in range(count)]
    shares = [case["clients"] // count + (place < case["clients"] % count) for place in range(count)]
    arguments = [{"model": case["model"], "clients": share, "device": str(device), "quick": settings.quick} for share in shares if share]

    def work(place: int) -> dict[str, Any]:
        seen = {"CUDA_VISIBLE_DEVICES": names[place]} if device.type == "cuda" else {}
        return call("experiments.benchmarks.accelerator", arguments[place], environment=seen)

    with ThreadPoolExecutor(len(arguments)) as pool:
        found = list(pool.map(work, range(len(arguments))))
    workload = workload_of(case["model"], case["clients"], 1)
    tokens = sum(each["tokens"] for each in found)
    return {"tokens": workload.tokens, "batch": workload.batch, "cohort": tokens / max(each["seconds"] for each in found)}


def train_share(model: str, clients: int, device: str, quick: bool) -> dict[str, Any]:
    """Trains a worker's share and returns its tokens and seconds, the median of a few turns."""
    workload = workload_of(model, clients, 1 if quick else 2)
    on = subject_of(model, device, False)
    data = workload.all_clients(on.vocabulary)

    def task() -> float:
        return _synchronised(lambda: workloads.train(on, data, workload.training), torch.device(device))

    speed = medians(interleaved({"cohort": task}, turns=3))["cohort"]
    return {"tokens": workload.num_tokens, "seconds": workload.num_tokens / speed}


SECTION = Section(
    "g",
    "Models of published size on an accelerator",
    "Random weights, bfloat16 base and float32 R of rank 200 on a GPU; published lengths and batches. *MFU*: 4 x parameters x tokens per "
    "second over the measured ceiling of matrix products. x is the cohort's rate over the other's. A row of the tiny model on a CPU only "
    "shows that the section runs.",
    (
        Column("model", "model"),
        Column("clients", "clients"),
        Column("way", "way"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("tokens/s", "cohort", "{:,.0f}"),
        Column("TFLOP/s", "tflops", "{:.2f}"),
        Column("ceiling", "ceiling_tflops", "{:.2f}"),
        Column("MFU, %", "utilisation", "{:.0f}"),
        Column("x one by one", "ratio_one by one", "{:.2f}"),
        Column("x centralised", "ratio_centralised", "{:.2f}"),
        Column("peak, GB", "peak_gb", "{:.1f}"),
    ),
    cases,
    measure,
)

if __name__ == "__main__":
    if asked()["device"] == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    answer(train_share(**asked()))

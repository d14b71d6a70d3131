"""Section k: the GPU memory and FLOPs of published shapes, from shapes alone: no GPU, and nothing is computed.

The code that trains on a GPU runs on a device with shapes but no values (`second_device`), which counts every live tensor.
"""

import gc
from dataclasses import replace

from experiments.benchmarks import workloads
from experiments.benchmarks.accelerator import PUBLISHED, RANK, parameters
from experiments.benchmarks.processes import answer, asked, call
from experiments.benchmarks.second_device import DEVICE
from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from experiments.benchmarks.workloads import Subject, Workload
from fedsim.choices import Dtype
from fedsim.cli.compose import compose
from fedsim.cli.groups import choice_values
from fedsim.config import ModelConfig
from fedsim.core.adapters import adapt
from fedsim.core.forms import LORA_SB
from fedsim.core.gradient_parts import parts_of
from fedsim.core.memory import pass_bytes, shape_of
from fedsim.shapes import random_model
from fedsim.training.budget import Load
from fedsim.training.gradients import weight_gradients

TOKENS_PER_PASS = 8192
GRADIENTS, SKETCHES = "initial gradients", "their sketches"
STEPS = 2
"""Two, because the moments do not exist yet in the first."""

COPIES = 4
"""Copies of every client's R in a stack: itself, its gradient, and two moments."""


def cases(settings: Settings) -> list[Case]:
    """Returns model, clients and way of training of every row."""
    if settings.quick:
        return [{"model": "llama32_1b", "clients": clients, "way": "plain"} for clients in (1, 5)]
    rows: list[Case] = []
    for model in PUBLISHED:
        rows += [{"model": model, "clients": clients, "way": "plain"} for clients in (1, 5, 25)]
        rows += [{"model": model, "clients": 25, "way": way} for way in ("DP-SGD", "checkpointing")]
        rows += [{"model": model, "clients": 1, "way": way} for way in (GRADIENTS, SKETCHES)]
    return rows


def measure(case: Case, settings: Settings) -> Found:
    """Runs one row in a process of its own."""
    return call("experiments.benchmarks.dry_run", case)


def dry_run_case(model: str, clients: int, way: str) -> Found:
    """Returns the bytes and FLOPs of the clients' local steps, or of one client's initial gradient."""
    tokens, batch = PUBLISHED[model]
    workload = Workload(model, clients, batch, tokens, steps=1, rank=RANK.get(model, 200))
    config = ModelConfig(architecture=dict(choice_values("model", model)["architecture"]), dtype=Dtype.bfloat16)
    device = DEVICE.install("shapes")
    base = random_model(config, device, activation_checkpointing=way == "checkpointing")
    on = Subject(base, adapt(base, LORA_SB, workload.rank, 1, 1.0, []))  # bases of zeros: values do not matter
    gc.collect()
    memory = DEVICE.memory
    before = memory.peak = memory.held
    DEVICE.flops = 0
    work = _gradient if way in (GRADIENTS, SKETCHES) else _steps
    step_tokens, times, stacks = work(on, workload, way)
    most = min(step_tokens, TOKENS_PER_PASS // tokens * tokens)
    shape, checkpointing = shape_of(base), way == "checkpointing"
    units, unit = (clients * batch, 1) if way == "DP-SGD" else (clients, batch)
    load = Load(on.spec, ("R",), units, unit, tokens)
    load = load.of_weight_gradients(0) if work is _gradient else load
    found: Found = {"batch": batch, "tokens": tokens, "pass_tokens": most, "before_gb": before / 1e9, "stacks_gb": stacks / 1e9}
    found |= {"pass_gb": (memory.peak - before - stacks) / 1e9, "peak_gb": memory.peak / 1e9}
    found["flops"] = DEVICE.flops / (4.0 * parameters(base) * step_tokens * times)
    found["budget"] = load.pass_bytes(shape, most, checkpointing=checkpointing) / 1e9 / found["pass_gb"]
    if work is _steps:
        groups = max(1.0, most / tokens / unit)
        expected = pass_bytes(shape, on.spec, ("R",), most, length=tokens, groups=groups, checkpointing=checkpointing)
        found["estimate"] = expected / 1e9 / found["pass_gb"]
    return found


def _steps(on: Subject, workload: Workload, way: str) -> tuple[int, int, int]:
    """Trains and returns the tokens of a step, the number of steps, and the bytes of the clients' stacks."""
    training = replace(workload.training, tokens_per_pass=TOKENS_PER_PASS, local_steps=STEPS)
    workloads.train(on, workload.all_clients(on.vocabulary), training, 1.0 if way == "DP-SGD" else None)
    return workload.num_tokens, STEPS, COPIES * 4 * on.layout.num_parameters * workload.clients


def _gradient(on: Subject, workload: Workload, way: str) -> tuple[int, int, int]:
    """Sums the weight gradients of eight sequences and returns their tokens, 1, and the bytes of the sums."""
    parts = parts_of(compose([f"adapter.sketch={str(way == SKETCHES).lower()}"]), on.spec)
    examples = replace(workload, batch=8).client(0, on.vocabulary).examples
    found = weight_gradients(on.model, examples, pad_id=workloads.PAD, tokens_per_pass=TOKENS_PER_PASS, parts=parts)
    return sum(example.num_tokens for example in examples), 1, sum(4 * gradient.numel() for gradient in found.values())


SECTION = Section(
    "k",
    "Memory on a GPU, from shapes alone",
    "Counted, not measured on a GPU: the training code runs on a device with shapes but without values, and all live tensors are "
    "added up. bfloat16 base, float32 R of rank 200, published lengths and batches, every token with a loss. *base and bases*: the "
    "model, A and B. *clients*: R of all clients, its gradient and two moments; of initial gradients their sums. *pass*: what else lives "
    "at the peak, with fused attention; kernel workspaces, gaps between tensors and the CUDA context come on top. *estimate / pass*: the "
    "pass memory of `fedsim estimate`; *budget / pass*: the one that `training.tokens_per_pass=auto` plans with. *FLOPs*: of all matrix "
    "products without attention, over the 4 x parameters x tokens of a frozen base.",
    (
        Column("model", "model"),
        Column("clients", "clients"),
        Column("way", "way"),
        Column("batch", "batch"),
        Column("tokens", "tokens"),
        Column("tokens of a pass", "pass_tokens", "{:,}"),
        Column("base and bases, GB", "before_gb", "{:.1f}"),
        Column("clients, GB", "stacks_gb", "{:.2f}"),
        Column("pass, GB", "pass_gb", "{:.1f}"),
        Column("peak, GB", "peak_gb", "{:.1f}"),
        Column("estimate / pass", "estimate", "{:.2f}"),
        Column("budget / pass", "budget", "{:.2f}"),
        Column("FLOPs / model FLOPs", "flops", "{:.2f}"),
    ),
    cases,
    measure,
)

if __name__ == "__main__":
    answer(dry_run_case(**asked()))

"""Whole runs on a second device (see experiments/benchmarks/second_device.py), each in its own process: PyTorch forgets no device."""

import json
import math
import os
import subprocess
import sys
from tempfile import TemporaryDirectory

import pytest

from experiments.benchmarks.processes import ROOT
from fedsim.cli.main import main
from fedsim.core.methods import METHODS

SMALL = (
    *("federation.clients=3", "federation.rounds=2", "training.batch_size=2", "training.local_steps=2", "adapter.init_samples=20"),
    *("data.train_examples=60", "data.test_examples=8", "evaluation.max_new_tokens=8"),
)
KINDS = {
    "sketches, new bases, checkpointing, bfloat16": (
        *("adapter.rank=16", "adapter.sketch=true", "adapter.refresh_every=1"),
        *("training.activation_checkpointing=true", "model.dtype=bfloat16"),
    ),
    "examples' privacy, noised initial gradients": ("privacy=example", "privacy.epsilon=8", "adapter.init=gradient_dp", "adapter.rank=16"),
}
MORE_KINDS = {
    "clients' privacy, secure sums": ("privacy=client", "privacy.epsilon=8", "privacy.secure_aggregation=true", "adapter.init=orthogonal"),
    "control variates": ("training.scaffold=true", "training.optimizer=sgd", "training.learning_rate=0.1"),
    "ranks of one's own": ("federation.ranks={8:0.5,16:0.5}", "adapter.init=orthogonal", "training.proximal_mu=0.1"),
    **{f"method {name}": (f"method={name}",) for name in METHODS},
}


def on_second_device(*arguments, memory_bytes=0):
    """Runs a fedsim command on the second device and returns its figures of the device's memory."""
    found = json.loads(run_python("-m", "experiments.benchmarks.second_device", str(memory_bytes), *arguments).splitlines()[-1])
    assert found["peak_bytes"] > 8_000_000, "less than the model itself: nothing ran there"
    return found


def run_python(*arguments):
    with TemporaryDirectory() as cache:  # no calibration or tokens of another run
        env = os.environ | {"XDG_CACHE_HOME": cache}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def with_device(code, made_of="values"):
    """Runs Python code in which `device` is the second device and `DEVICE` has its figures, and returns its output."""
    return run_python(
        "-c", f"import torch\nfrom experiments.benchmarks.second_device import DEVICE\ndevice = DEVICE.install({made_of!r})\n{code}"
    )


def figures(folder):
    """Returns the losses and accuracies of a run, in order."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    trained = [event["train_loss"] or 0.0 for event in events if event["kind"] == "round"]  # private clients report none
    tested = [event[name] for event in events if event["kind"] == "evaluated" for name in ("loss", "accuracy")]
    assert (len(trained), len(tested)) == (2, 8)
    return trained + tested


def test_the_device_refuses_and_accepts_the_same_operations_as_a_gpu():
    refused = with_device(
        """
there, here = torch.ones(3, device=device), torch.ones(3)
tries = {
    "sum": lambda: there + here,
    "product": lambda: torch.nn.Linear(3, 2).to(device)(here),
    "list": lambda: torch._foreach_add_([there], [here]),
    "values at an index": lambda: there.index_add_(0, torch.tensor([0, 1, 2], device=device), here),
    "index of the CPU's": lambda: here[torch.tensor([0], device=device)],
    "values of the CPU at an index": lambda: there.__setitem__(torch.tensor([True, False, True]), here[:2]),
    "generator": lambda: there.normal_(generator=torch.Generator()),
    "numpy": lambda: there.numpy(),
    "index by index_select": lambda: there.index_select(0, torch.tensor(0)),
    "number in a list": lambda: torch.stack([there.sum(), here.sum()]),
    "number of the CPU's": lambda: here.sum().add_(there.sum()),
    "number": lambda: there * here.sum(),
    "index": lambda: there[torch.tensor([True, False, True])],
    "copies": lambda: there.copy_(here).cpu() + here,
}
for name, attempt in tries.items():
    try:
        attempt()
    except Exception:
        print(name)
"""
    )
    assert refused.splitlines() == [
        "sum",
        "product",
        "list",
        "values at an index",
        "index of the CPU's",
        "values of the CPU at an index",
        "generator",
        "numpy",
        "index by index_select",
        "number in a list",
        "number of the CPU's",
    ]


def test_a_run_equals_the_cpu_even_when_memory_runs_out(tmp_path):
    steps = ("training.optimizer=sgd", "training.learning_rate=0.5")  # Adam divides by the size of a gradient, rounding included
    options = ("run", *SMALL, *steps, "adapter.init=orthogonal", "training.tokens_per_pass=1024", "training.batch_size=4")
    assert main([*options, f"run_dir={tmp_path / 'cpu'}"]) == 0
    free = on_second_device(*options, f"run_dir={tmp_path / 'free'}")
    scarce = on_second_device(*options, f"run_dir={tmp_path / 'scarce'}", memory_bytes=free["peak_bytes"] * 2 // 3)
    assert free["times_full"] == 0 < scarce["times_full"]
    for folder in ("free", "scarce"):
        assert figures(tmp_path / folder) == pytest.approx(figures(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(KINDS[name], id=name) for name in KINDS),
        *(pytest.param(MORE_KINDS[name], id=name, marks=pytest.mark.slow) for name in MORE_KINDS),
    ],
)
def test_a_run_never_mixes_devices(tmp_path, options):
    on_second_device("run", *SMALL, *options, f"run_dir={tmp_path}")
    assert all(map(math.isfinite, figures(tmp_path)))


@pytest.mark.slow
def test_an_audit_and_an_estimate_never_mix_devices(tmp_path):
    on_second_device("estimate", *SMALL)
    on_second_device("audit", "experiment=audit", "privacy.epsilon=2", "federation.rounds=1", f"run_dir={tmp_path}")


def test_passes_take_the_estimated_memory():
    """Compares measured bytes of a pass with `pass_bytes` over models, factors, dtypes and ways of training."""
    measured = with_device(
        """
import gc
from itertools import product
from experiments.benchmarks.workloads import Workload
from fedsim.choices import Dtype
from fedsim.config import ModelConfig, TrainingConfig
from fedsim.core.adapters import adapt, factors
from fedsim.core.forms import DENSE, LORA, LORA_SB
from fedsim.core.memory import pass_bytes, shape_of
from fedsim.seeding import NoiseKey
from fedsim.shapes import random_model
from fedsim.training.cohort import train_cohort
from fedsim.training.private import PrivateRule

CLIENTS, BATCH, LENGTH, TOKENS = 4, 2, 64, 512
SIZES = {"vocab_size": 4000, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8}
MODELS = {
    "llama": SIZES | {"intermediate_size": 896, "num_key_value_heads": 2, "max_position_embeddings": 512},
    "gpt2": {"vocab_size": 4000, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512},
    "bert": SIZES | {"intermediate_size": 1024, "is_decoder": True},
}
DATA = [Workload("", CLIENTS, BATCH, LENGTH, steps=2).client(number, 4000) for number in range(CLIENTS)]
TRAINED = ((LORA_SB, ("R",)), (LORA, ("B", "A")), (DENSE, ("D",)))
for (name, entries), dtype, sparing, noise, (form, kinds) in product(MODELS.items(), Dtype, (False, True), (0.0, 1.0), TRAINED):
    if (form is DENSE and noise) or (name != "llama" and (form is DENSE or dtype is Dtype.float32)):
        continue
    model = random_model(ModelConfig(architecture={"model_type": name, **entries}, dtype=dtype), device, activation_checkpointing=sparing)
    spec = adapt(model, form, 16, 1, 1.0, [])
    start, layout, clients = spec.pack(factors(model, kinds), kinds), spec.layout(kinds), DATA[: 1 if form is DENSE else CLIENTS]
    private = PrivateRule(1.0, (noise,) * CLIENTS, NoiseKey.of_seed(0)) if noise else None
    gc.collect()
    DEVICE.memory.peak = before = DEVICE.memory.held
    tokens = []
    training = TrainingConfig(batch_size=BATCH, local_steps=2, tokens_per_pass=TOKENS)
    told = {"pad_id": 0, "seed": 0, "round": 1, "rounds": 1, "private": private}
    train_cohort(model, start, layout, clients, training, **told, on_pass=lambda facts: tokens.append(facts.num_tokens))
    took = DEVICE.memory.peak - before - 16 * layout.num_parameters * len(clients)
    rows = max(tokens) / LENGTH
    groups = rows if noise else rows / BATCH
    expected = pass_bytes(shape_of(model), spec, kinds, max(tokens), length=LENGTH, groups=groups, checkpointing=sparing)
    print(took / expected, name, dtype.value, form.name, "checkpointing" * sparing, "DP" * bool(noise))
""",
        made_of="shapes",
    )
    ratios = {line: float(line.split()[0]) for line in measured.splitlines() if line[:1].isdigit()}
    assert len(ratios) == 36
    assert all(0.8 < ratio < 1.05 for ratio in ratios.values()), measured


def test_bases_and_noise_of_large_adapters_equal_those_of_the_cpu():
    """The device draws noise ahead, even for a step that is restarted."""
    found = with_device(
        """
from fedsim.core import decomposition
from fedsim.core.decomposition import truncated_svd
from fedsim.core.payload import Layout
from fedsim.training import private
from fedsim.training.private import CohortDPOptimizer

private.THREADED_FROM = 4
matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
for decomposition.EXACT_SVD_LIMIT in (100, 10):
    DEVICE.calls.clear()
    print(all(map(torch.equal, truncated_svd(matrix, 4, 0, "x", device), truncated_svd(matrix, 4, 0, "x"))), bool(DEVICE.calls))

def steps(on, begins):
    taken = []
    optimizer = CohortDPOptimizer(
        torch.zeros(2, 5, device=on), Layout(("R",), ((5,),)), lambda gradients: taken.append(gradients.cpu().clone()),
        noise_multipliers=[1.0, 2.0], clip_norm=1.0, expected_batch_sizes=[1.0, 2.0],
        generators=[torch.Generator().manual_seed(seed) for seed in range(2)],
    )
    for active in (2, 2, 1):
        for _ in range(begins):
            optimizer.start(torch.zeros(active, 5, device=on))
        optimizer.finish()
    return torch.cat(taken)

print(torch.equal(steps(device, 2), steps("cpu", 1)), len(steps("cpu", 1)))
"""
    )
    assert found.splitlines() == ["True True", "True True", "True 5"]


def test_a_cohort_step_launches_about_as_many_operators_as_a_centralised_one_and_waits_as_often():
    """Does not count views, which launch nothing. Both wait once in each forward pass, when transformers checks for packed sequences; a
    cohort also waits for its factors and losses at the end."""
    launched = with_device(
        """
from experiments.benchmarks import workloads
from experiments.benchmarks.peers import centralised

VIEWS = "view expand transpose t permute slice select unsqueeze split_with_sizes detach empty _unsafe_view alias as_strided".split()
on = workloads.adapted(workloads.base_model("tiny").to(device), 16)
workload = workloads.Workload("", clients=25, batch=1, tokens=32, steps=8)
clients, training = workload.all_clients(on.vocabulary), workload.training
workloads.train(on, clients, training)  # in the first pass of all it is found out whether the head comes last
for train in (workloads.train, centralised.train):
    DEVICE.calls.clear()
    DEVICE.waits = 0
    train(on, clients, training)
    print(sum(number for operator, number in DEVICE.calls.items() if str(operator).split(".")[1] not in VIEWS), DEVICE.waits)
"""
    )
    (cohort, waits), (centralised, their_waits) = (map(int, line.split()) for line in launched.splitlines())
    print(cohort, centralised)
    assert cohort < centralised + 8 * 30, "for the stack, the optimizer's rule and the tokens with a loss, in each of 8 steps"
    assert their_waits == 8
    assert waits == 8 + 2

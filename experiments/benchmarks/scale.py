"""Section s: what a million clients, or a model of 70 billion parameters, would need. Computed, not measured.

Runs `fedsim estimate` with rates from an accelerator's data sheet instead of this machine's; all assumptions are listed under the table.
"""

from dataclasses import dataclass
from math import ceil

from experiments.benchmarks.suite import Case, Column, Found, Section, Settings
from fedsim.cli.compose import compose
from fedsim.cli.estimate import Answer, estimate_of
from fedsim.core.estimate import Calibration
from fedsim.core.memory import ModelShape
from fedsim.shapes import model_shape


@dataclass(frozen=True)
class Accelerator:
    """A device's data sheet, and the fractions of it that are assumed to be reached."""

    name: str = "H200"
    flops: float = 989e12  # bfloat16, dense
    memory_bytes: float = 141e9
    bytes_per_second: float = 4.8e12
    training: float = 0.45  # fraction of the FLOP/s: the goal, not measured
    decoding: float = 0.3
    layer_seconds: float = 1e-3  # per layer in a pass besides its FLOPs: kernel launches
    svd_flops: float = 1e12


DEVICE = Accelerator()
MESSAGES = {"copy_bytes": 1e9, "client_seconds": 1e-3}
"""Of the server: bytes of uploads per second, and seconds for a client's messages; section c measures them."""

TOKENS = 256

_MILLION = (
    "federation.clients=1000000 federation.fraction=0.001 federation.rounds=1000 data=arithmetic data.train_examples=4000000 "
    "model=llama32_1b training.batch_size=8 training.tokens_per_pass=16384"
)
_SEVENTY = "experiment=arithmetic_mistral_7b model=llama31_70b training.tokens_per_pass=4096"
CONFIGURATIONS = (
    f"{_MILLION} adapter.init=orthogonal",
    f"{_MILLION} method=fedit adapter.rank=32",
    f"{_SEVENTY} adapter.init=gradient",
    f"{_SEVENTY} adapter.init=gradient adapter.sketch=true",
    f"{_SEVENTY} adapter.init=orthogonal",
)


def cases(settings: Settings) -> list[Case]:
    """Returns the overrides of every run."""
    return [{"configuration": each} for each in (CONFIGURATIONS[2:4] if settings.quick else CONFIGURATIONS)]


def measure(case: Case, settings: Settings) -> Found:
    """Returns the time on one device, memory, and bytes."""
    given = compose(case["configuration"].split())
    answer = estimate_of(given, tokens=TOKENS, rates=rates_of(DEVICE, model_shape(given.model)))
    return needs(answer)


def rates_of(device: Accelerator, shape: ModelShape) -> Calibration:
    """Returns the rates assumed for a model on a device."""
    return Calibration(
        flops=device.training * device.flops,
        pass_seconds=device.layer_seconds * shape.layers,
        client_step_seconds=0.0,
        decode_flops=device.decoding * device.flops,
        decode_seconds=shape.weight_bytes * shape.parameters / device.bytes_per_second,
        svd_flops=device.svd_flops,
        process_bytes=2_000_000_000,
        source=f"assumed of {device.name}",
        **MESSAGES,
    )


def needs(answer: Answer) -> Found:
    """Returns the row of an estimate."""
    found, federation = answer.found, answer.config.federation
    moved = {name: found.num_bytes[f"{name}_payload_bytes"] for name in ("uplink", "downlink", "setup")}
    return {
        "parameters": answer.shape.parameters / 1e9,
        "clients": federation.clients,
        "device_hours": found.seconds / 3600,
        "flops": found.flops,
        "memory_gb": found.peak_bytes / 1e9,
        "devices": ceil(found.peak_bytes / DEVICE.memory_bytes),
        "up_gb": moved["uplink"] / 1e9,
        "down_gb": (moved["downlink"] + moved["setup"]) / 1e9,
        "line_seconds": answer.network_seconds,
    }


SECTION = Section(
    "s",
    "A million clients, and 70 billion parameters",
    f"Computed by `fedsim estimate`, not measured, for one {DEVICE.name} of {DEVICE.memory_bytes / 1e9:.0f} GB at {DEVICE.training:.0%} of "
    f"{DEVICE.flops / 1e12:.0f} TFLOP/s in training (an aim that nobody has measured yet) and {DEVICE.decoding:.0%} in decoding, weights "
    f"read at {DEVICE.bytes_per_second / 1e12:.1f} TB/s, {1e3 * DEVICE.layer_seconds:.0f} ms for each layer of a pass besides, messages at "
    f"{MESSAGES['copy_bytes'] / 1e9:.0f} GB/s and {1e3 * MESSAGES['client_seconds']:.0f} ms a client, decompositions at "
    f"{DEVICE.svd_flops / 1e12:.0f} TFLOP/s. Examples have {TOKENS} tokens, half of them response; evaluation on GSM8K and MATH before and "
    "after; `fedsim estimate` prints all assumptions. Memory is for one process that holds the whole model, the server and, in turn, all "
    "clients of a cohort; *devices* divides it by the memory of one device: fedsim does not split a model over devices, so a row with more "
    "than one cannot run as it stands. *own line*: a client's seconds at 100 Mbit/s over the whole run, if it were a separate machine. "
    "Hours fall with the number of workers, each of which holds the model.",
    (
        Column("configuration", "configuration", "`{}`"),
        Column("parameters, 10^9", "parameters", "{:.1f}"),
        Column("clients", "clients", "{:,}"),
        Column("training FLOPs", "flops", "{:.1e}"),
        Column("hours on one device", "device_hours", "{:,.1f}"),
        Column("memory, GB", "memory_gb", "{:,.0f}"),
        Column("devices", "devices", "{:.0f}"),
        Column("up, GB", "up_gb", "{:,.0f}"),
        Column("down and set-up, GB", "down_gb", "{:,.0f}"),
        Column("own line, s", "line_seconds", "{:,.1f}"),
    ),
    cases,
    measure,
)

"""The rates of this machine for a model of a given shape, measured in a few seconds and kept for the next time.

A model of up to `DIRECT_LIMIT` parameters is built with random weights and trained as a run would train it. For a larger one the rates are
predicted from the throughput of matrix products of its width, times the part of it that a model of 20 M parameters reaches here.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from fedsim.config import Config, ModelConfig
from fedsim.core import gemm
from fedsim.core.adapters import adapt, install
from fedsim.core.adapters import factors as installed
from fedsim.core.collecting import WeightedMean
from fedsim.core.decomposition import svd_flops, truncated_svd
from fedsim.core.estimate import Calibration, chain_parameters, forward_flops, training_flops
from fedsim.core.forms import AdapterSpec
from fedsim.core.initialization import from_seed, lora
from fedsim.core.memory import ModelShape
from fedsim.core.methods import Method
from fedsim.core.participation import round_size
from fedsim.files import atomic_write_json, cache_folder
from fedsim.flower.records import from_record, serialized_bytes, to_record
from fedsim.manifest import cpu_name
from fedsim.memory import resident_bytes
from fedsim.models import DTYPES, device
from fedsim.plain import to_dict
from fedsim.seeding import numpy_generator
from fedsim.shapes import model_shape, random_model
from fedsim.training.budget import TokenBudget
from fedsim.training.cohort import ClientData, train_cohort
from fedsim.training.evaluation import generate
from fedsim.types import EncodedExample

DIRECT_LIMIT = 60_000_000
"""Parameters of the largest model that is built to be measured."""

PROXY = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 16}
PROXY |= {"vocab_size": 2272, "max_position_embeddings": 512, "tie_word_embeddings": True}
"""The model whose part of the matrix products' throughput stands for that of a larger one."""

MOST_NUMBERS = 1 << 22
"""Numbers in the message that is measured; larger ones are predicted from it."""

VERSION = 5  # of what is measured: another one makes kept calibrations worthless


def calibrated(config: Config, method: Method, spec: AdapterSpec, tokens: int, *, again: bool = False) -> Calibration:
    """Returns the rates of this machine for the model and training that `config` names, for examples of `tokens` tokens.

    They are kept in the user's cache folder, by machine, versions, model and training; `again` measures anew.
    """
    path = cache_folder() / "calibration" / f"{_key(config, spec, tokens)}.json"
    if path.exists() and not again:
        known = json.loads(path.read_bytes())
        if set(known) == {field.name for field in fields(Calibration)}:
            return Calibration(**known)
    shape = model_shape(config.model)
    found = _direct(config, method, shape, tokens) if shape.parameters <= DIRECT_LIMIT else _from_products(config, method, shape, tokens)
    copy_bytes, client_seconds = _message_rates(spec.num_parameters(method.uploaded(1)))
    found = replace(found, copy_bytes=copy_bytes, client_seconds=client_seconds, svd_flops=_svd_rate(spec))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, asdict(found))
    return found


def _key(config: Config, spec: AdapterSpec, tokens: int) -> str:
    machine = [
        os.uname().machine,
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        str(device(config.model)),
        _device_name(config),
    ]
    training = {name: to_dict(config.training)[name] for name in ("batch_size", "accumulation", "optimizer", "tokens_per_pass")}
    cohort = [round_size(config.federation.clients, config.federation.fraction), config.engine.cohort_size]
    what = [
        VERSION,
        machine,
        to_dict(config.model),
        config.method.name,
        [spec.rank, spec.heads, spec.scaling, spec.layers, spec.head],
        training,
        cohort,
        tokens,
        [config.evaluation.tokens_per_pass, config.evaluation.max_new_tokens],
    ]
    return sha256(json.dumps(what).encode()).hexdigest()[:24]


def _device_name(config: Config) -> str:
    on = device(config.model)
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    return cpu_name()


# ---- a model that is built


def _direct(config: Config, method: Method, shape: ModelShape, tokens: int) -> Calibration:
    kernels = gemm.KERNEL_BYTES if gemm.is_for_onednn(DTYPES[config.model.dtype], device(config.model)) else 0
    process = resident_bytes() + kernels
    model = random_model(config.model, device(config.model))
    spec = adapt(model, method.form, config.adapter.rank, config.method.heads, config.adapter.scaling, config.adapter.target_modules)
    factors = lora(spec, {}, 0) if spec.kinds == ("B", "A") else from_seed(spec, {}, 0) if "R" in spec.kinds or "H" in spec.kinds else {}
    install(model, {name: tensor.to(device(config.model)) for name, tensor in factors.items()})
    flops, pass_seconds, client_seconds = _training_rates(config, method, shape, spec, model, tokens)
    decode_flops, decode_seconds = _generation_rates(config, shape, model, tokens, flops)
    return Calibration(
        flops=flops,
        pass_seconds=pass_seconds,
        client_step_seconds=client_seconds,
        decode_flops=decode_flops,
        decode_seconds=decode_seconds,
        copy_bytes=0.0,
        client_seconds=0.0,
        svd_flops=0.0,
        process_bytes=process,
        source=f"the model itself with random weights, {tokens} tokens an example",
    )


def _training_rates(
    config: Config, method: Method, shape: ModelShape, spec: AdapterSpec, model: Any, tokens: int
) -> tuple[float, float, float]:
    """Returns FLOP/s, seconds of a pass and seconds of a client's step: the three unknowns of a few cohorts' times."""
    training = replace(config.training, local_steps=1, local_epochs=None)
    batch = training.batch_size * training.accumulation
    most = max(1, min(round_size(config.federation.clients, config.federation.fraction), int(training.tokens_per_pass) // (batch * tokens)))
    short = max(4, tokens // 2)
    points = dict.fromkeys([(1, tokens), (most, tokens), (max(1, most // 2), tokens), (most, short), (1, short)])
    kinds = method.trained(1)
    layout, start = spec.layout(kinds), spec.pack(installed(model, kinds), kinds)

    def train(clients: int, length: int) -> None:
        data = [_client(number, batch, length, shape.vocabulary) for number in range(clients)]
        train_cohort(model, start, layout, data, training, pad_id=0, seed=0, round=1, rounds=1)

    adapters, trained = chain_parameters(spec), layout.num_parameters
    rows, seconds = [], []
    for clients, length in points:
        flops = training_flops(shape, clients * batch * length, length, clients * batch * length / 2, adapters, trained)
        rows.append([flops, max(1, -(-clients * batch * length // int(training.tokens_per_pass))), clients])
        seconds.append(_fastest(lambda clients=clients, length=length: train(clients, length)))  # type: ignore[misc]
    per_flop, per_pass, per_client = _solved(rows, seconds)
    return 1.0 / max(per_flop, 1e-18), per_pass, per_client


def _client(number: int, batch: int, tokens: int, vocabulary: int) -> ClientData:
    ids = numpy_generator(0, "calibration", number).integers(0, vocabulary, (batch, tokens)).astype(np.int32)
    return ClientData(number, [EncodedExample(row, max(1, tokens // 2)) for row in ids])


def _generation_rates(config: Config, shape: ModelShape, model: Any, tokens: int, flops: float) -> tuple[float, float]:
    """Returns FLOP/s of decoding and seconds of a decoding step besides."""
    options, prompt = config.evaluation, max(2, tokens // 2)
    most = max(2, min(128, int(options.tokens_per_pass) // (prompt + options.max_new_tokens)))
    rows, seconds = [], []
    for count, steps in ((most, 16), (max(1, most // 8), 16), (most, 6)):
        prompts = numpy_generator(0, "calibration", count).integers(0, shape.vocabulary, (count, prompt)).tolist()
        took = _fastest(
            lambda prompts=prompts, steps=steps: generate(  # type: ignore[misc]
                model, prompts, eos_id=-1, pad_id=0, max_new_tokens=steps, budget=TokenBudget(1 << 30)
            )
        )
        seconds.append(max(1e-6, took - forward_flops(shape, count * prompt, prompt, count) / flops))
        rows.append([forward_flops(shape, count * steps, prompt + steps / 2, count * steps), steps])
    per_flop, per_step = _solved(rows, seconds)
    return 1.0 / max(per_flop, 1e-18), per_step


def _fastest(work: Callable[[], Any], times: int = 3) -> float:
    """Returns the seconds of the fastest of a few calls after a first one: what disturbs only ever adds."""
    work()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def _solved(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Returns the non-negative seconds per unit of each column that explain the measured seconds best, relative errors counting alike."""
    matrix, right = np.asarray(rows, dtype=float), np.asarray(seconds)
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale / right[:, None], np.ones(len(right)))
    return list(found / scale)


# ---- a model that is too large to be built


def _from_products(config: Config, method: Method, shape: ModelShape, tokens: int) -> Calibration:
    proxy = ModelConfig(architecture=dict(PROXY), dtype=config.model.dtype, device=config.model.device)
    adapter = replace(config.adapter, rank=min(config.adapter.rank or 64, 64), target_modules=[])
    proxy_shape = model_shape(proxy)
    measured = _direct(replace(config, model=proxy, adapter=adapter), method, proxy_shape, min(tokens, 256))
    on, dtype = device(config.model), DTYPES[config.model.dtype]
    part = min(1.0, measured.flops / product_flops(PROXY["hidden_size"], PROXY["intermediate_size"], on, dtype))  # type: ignore[arg-type]
    rate = product_flops(min(shape.hidden, 4096), min(4 * shape.hidden, 14336), on, dtype)
    layers = shape.layers / proxy_shape.layers
    return replace(
        measured,
        flops=part * rate,
        pass_seconds=measured.pass_seconds * layers,
        decode_flops=part * rate,
        decode_seconds=shape.weight_bytes * shape.parameters / _memory_rate(on),
        source=f"matrix products of its width, {rate / 1e9:,.0f} GFLOP/s, times the part that a 20 M-parameter model reaches, {part:.2f}",
    )


def product_flops(inner: int, outer: int, on: torch.device, dtype: torch.dtype, tokens: int = 1024) -> float:
    """Returns the FLOP/s of a layer's product, [tokens, inner] by [outer, inner]."""
    left, right = torch.randn(tokens, inner, device=on).to(dtype), torch.randn(outer, inner, device=on).to(dtype)

    def multiply() -> None:
        gemm.linear(left, right)
        if on.type == "cuda":
            torch.cuda.synchronize(on)

    return 2.0 * tokens * inner * outer / _fastest(multiply)


def _memory_rate(on: torch.device) -> float:
    """Returns the bytes per second at which weights are read."""
    numbers = torch.ones(1 << 26, device=on)

    def read() -> None:
        float(numbers.sum())

    return 4.0 * len(numbers) / _fastest(read)


# ---- messages and decompositions


def _message_rates(parameters: int) -> tuple[float, float]:
    """Returns bytes per second of what an upload goes through (packing, counting, checks, the mean), and seconds of one without bytes."""
    large = max(1024, min(parameters, MOST_NUMBERS))
    few = _fastest(lambda: _message(64), 5)
    many = _fastest(lambda: _message(large))
    return 4.0 * (large - 64) / max(1e-9, many - few), few


def _message(numbers: int) -> None:
    record = to_record(torch.ones(numbers))
    serialized_bytes(record)
    WeightedMean(numbers).add(1.0, from_record(record, numbers))


def _svd_rate(spec: AdapterSpec) -> float:
    rows, columns = (min(side, 512) for side in max(spec.layers.values()))
    matrix = torch.randn(rows, columns)
    seconds = _fastest(lambda: truncated_svd(matrix, min(spec.rank, rows, columns), 0, "calibration"), 1)
    return svd_flops(rows, columns, spec.rank) / seconds

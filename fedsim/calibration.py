"""Measures this machine's training and generation rates for a given model shape, in a few seconds, and caches them.

A model of up to `DIRECT_LIMIT` parameters is built with random weights and trained as in a run. For a larger model the rates are predicted:
the throughput of matrix products of its width, times the fraction of it that a 20 M-parameter model of its kind reaches here.
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

from fedsim.config import Config
from fedsim.core import gemm
from fedsim.core.adapters import adapt, install
from fedsim.core.adapters import factors as installed
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.collecting import WeightedMean
from fedsim.core.decomposition import svd_flops, truncated_svd
from fedsim.core.estimate import Calibration, chain_parameters, forward_flops, trained_parameters, training_flops
from fedsim.core.forms import LORA, AdapterSpec
from fedsim.core.heads import head_layers
from fedsim.core.initialization import from_seed, lora, new_head
from fedsim.core.memory import ModelShape
from fedsim.core.methods import Method
from fedsim.core.participation import round_size
from fedsim.files import atomic_write_json, cache_folder
from fedsim.flower.records import from_record, serialized_bytes, to_record
from fedsim.manifest import cpu_name
from fedsim.memory import resident_bytes
from fedsim.models import DTYPES, device, head_paths
from fedsim.plain import to_dict
from fedsim.seeding import numpy_generator
from fedsim.shapes import model_shape, random_model
from fedsim.training.budget import TokenBudget
from fedsim.training.cohort import ClientData, train_cohort
from fedsim.training.evaluation import generate
from fedsim.training.padding import WIDTH_STEP
from fedsim.types import AnyEncoded, EncodedExample, EncodedLabelled

DIRECT_LIMIT = 60_000_000
"""Parameters of the largest model that is built and measured directly."""

PROXY: dict[str, Any] = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
PROXY |= {"num_attention_heads": 16, "vocab_size": 2272, "max_position_embeddings": 512, "tie_word_embeddings": True}
"""The model whose fraction of the matrix-product throughput is assumed for larger models."""

ENCODER: dict[str, Any] = {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
ENCODER |= {"num_attention_heads": 8, "vocab_size": 2272, "max_position_embeddings": 512}
"""The same for classifiers."""

MOST_NUMBERS = 1 << 22
"""Most numbers in a measured message; larger messages are predicted from it."""

VERSION = 6  # of the measurement: a new version invalidates cached calibrations


def calibrated(
    config: Config, method: Method, spec: AdapterSpec, tokens: int, labels: Sequence[str] = (), texts: int = 2, *, again: bool = False
) -> Calibration:
    """Returns this machine's rates for the model and training in `config`, for examples of `tokens` tokens.

    With `labels`, the examples are classified rows of `texts` texts each. The rates are cached in the user's cache folder by machine,
    versions, model and training; `again` measures them again.
    """
    path = cache_folder() / "calibration" / f"{_key(config, spec, tokens)}.json"
    if path.exists() and not again:
        known = json.loads(path.read_bytes())
        if set(known) == {field.name for field in fields(Calibration)}:
            return Calibration(**known)
    measure = _direct if model_shape(config.model, labels, texts).parameters <= DIRECT_LIMIT else _from_products
    found = measure(config, method, tokens, labels, texts)
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


# ---- small models, measured directly


def _direct(config: Config, method: Method, tokens: int, labels: Sequence[str], texts: int) -> Calibration:
    kernels = gemm.KERNEL_BYTES if gemm.is_for_onednn(DTYPES[config.model.dtype], device(config.model)) else 0
    process = resident_bytes() + kernels
    shape, on, adapter = model_shape(config.model, labels, texts), device(config.model), config.adapter
    model = random_model(config.model, on, labels, texts)
    head = head_paths(model) if labels else []
    spec = adapt(model, method.form, adapter.rank, config.method.heads, adapter.scaling, adapter.target_modules, head)
    bases = (lora if spec.form is LORA else from_seed)(spec, {}, 0) if spec.form.low_rank else {}
    install(model, {name: tensor.to(on) for name, tensor in (new_head(spec, 0) | bases).items()})
    flops, pass_seconds, client_seconds = _training_rates(config, method, shape, spec, model, tokens)
    decode_flops, decode_seconds = (0.0, 0.0) if labels else _generation_rates(config, shape, model, tokens, flops)
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
    """Returns FLOP/s, seconds per pass and seconds per client step, solved from the times of a few cohorts.

    Row lengths need no padding, so that the rates exclude it.
    """
    training = replace(config.training, local_steps=1, local_epochs=None)
    batch = training.batch_size * training.accumulation
    step = WIDTH_STEP * _sequences(model)
    steps = max(2, tokens // step)
    tokens, short = steps * step, steps // 2 * step
    most = max(1, min(round_size(config.federation.clients, config.federation.fraction), int(training.tokens_per_pass) // (batch * tokens)))
    points = dict.fromkeys([(1, tokens), (most, tokens), (max(1, most // 2), tokens), (most, short), (1, short)])
    kinds = method.trained(1)
    layout, start = spec.layout(kinds), spec.pack(installed(model, kinds), kinds)

    def train(clients: int, length: int) -> None:
        data = [ClientData(number, _examples(number, batch, length, model)) for number in range(clients)]
        train_cohort(model, start, layout, data, training, pad_id=0, seed=0, round=1, rounds=1)

    adapters, trained = chain_parameters(spec), trained_parameters(spec, kinds)
    rows, seconds = [], []
    for clients, length in points:
        total = clients * batch * length
        flops = training_flops(shape, total, length / _sequences(model), total / 2, adapters, trained)
        rows.append([flops, max(1, -(-total // int(training.tokens_per_pass))), clients])
        seconds.append(_fastest(lambda clients=clients, length=length: train(clients, length)))  # type: ignore[misc]
    per_flop, per_pass, per_client = _solved(rows, seconds)
    return 1.0 / max(per_flop, 1e-18), per_pass, per_client


def _examples(client: int, batch: int, tokens: int, model: Any) -> list[AnyEncoded]:
    """Returns random rows in the model's input format: classified, or with a loss on half of their tokens."""
    ids = numpy_generator(0, "calibration", client).integers(0, model.config.vocab_size, (batch, tokens)).astype(np.int32)
    if not head_layers(model):
        return [EncodedExample(row, max(1, tokens // 2)) for row in ids]
    split = tokens // 2 if _sequences(model) == 2 else 0
    return [EncodedLabelled(row, row[:0], 0, split) for row in ids]


def _sequences(model: Any) -> int:
    """Returns the number of sequences in which the model reads a row."""
    return model.texts if isinstance(model, BiEncoder) else 1


def _generation_rates(config: Config, shape: ModelShape, model: Any, tokens: int, flops: float) -> tuple[float, float]:
    """Returns FLOP/s of decoding and the fixed seconds per decoding step."""
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
    """Returns the seconds of the fastest of a few calls after a warm-up: disturbances only add time."""
    work()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def _solved(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Returns the seconds per unit of each column, by non-negative least squares on the relative errors of the measured seconds."""
    matrix, right = np.asarray(rows, dtype=float), np.asarray(seconds)
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale / right[:, None], np.ones(len(right)))
    return list(found / scale)


# ---- large models, predicted


def _from_products(config: Config, method: Method, tokens: int, labels: Sequence[str], texts: int) -> Calibration:
    shape, architecture = model_shape(config.model, labels, texts), ENCODER if labels else PROXY
    proxy = replace(config.model, path=None, architecture=dict(architecture))
    adapter = replace(config.adapter, rank=min(config.adapter.rank or 64, 64), target_modules=[])
    measured = _direct(replace(config, model=proxy, adapter=adapter), method, min(tokens, 256), labels, texts)
    on, dtype = device(config.model), DTYPES[config.model.dtype]
    part = min(1.0, measured.flops / product_flops(architecture["hidden_size"], architecture["intermediate_size"], on, dtype))
    rate = product_flops(min(shape.hidden, 4096), min(4 * shape.hidden, 14336), on, dtype)
    found = replace(
        measured,
        flops=part * rate,
        pass_seconds=measured.pass_seconds * shape.layers / architecture["num_hidden_layers"],
        source=f"matrix products of its width, {rate / 1e9:,.0f} GFLOP/s, times the part that a 20 M-parameter model reaches, {part:.2f}",
    )
    if labels:
        return found
    return replace(found, decode_flops=found.flops, decode_seconds=shape.weight_bytes * shape.parameters / _memory_rate(on))


def product_flops(inner: int, outer: int, on: torch.device, dtype: torch.dtype, tokens: int = 1024) -> float:
    """Returns the FLOP/s of a layer's matrix product, [tokens, inner] by [outer, inner]."""
    left, right = torch.randn(tokens, inner, device=on).to(dtype), torch.randn(outer, inner, device=on).to(dtype)

    def multiply() -> None:
        gemm.linear(left, right)
        if on.type == "cuda":
            torch.cuda.synchronize(on)

    return 2.0 * tokens * inner * outer / _fastest(multiply)


def _memory_rate(on: torch.device) -> float:
    """Returns the bytes per second of reading weights from memory."""
    numbers = torch.ones(1 << 26, device=on)

    def read() -> None:
        float(numbers.sum())

    return 4.0 * len(numbers) / _fastest(read)


# ---- messages and decompositions


def _message_rates(parameters: int) -> tuple[float, float]:
    """Returns the bytes per second of processing an upload (packing, counting, checks, mean), and its fixed seconds."""
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

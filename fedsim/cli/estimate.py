"""`fedsim estimate`: predicts a run's time, memory and bytes from shapes and a few seconds of measurement on this machine.

No weights are loaded. The bytes are those of `fedsim cost`, the rates come from `fedsim.calibration`, and the arithmetic is in
`fedsim.core.estimate`.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fedsim.calibration import calibrated
from fedsim.choices import AUTO, PairReading, PrivacyUnit, TrainOn
from fedsim.cli.calling import width
from fedsim.config import Config, DataConfig
from fedsim.core.cost import forecast
from fedsim.core.decomposition import CPU
from fedsim.core.estimate import PADDED, Calibration, Estimate, Work, estimate
from fedsim.core.forms import AdapterSpec
from fedsim.core.memory import ModelShape
from fedsim.core.participation import round_size
from fedsim.data import Dataset, labels, load
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.models import EMBEDDED, check_architecture, context, device, local_tokenizer, looks_local
from fedsim.progress import plural, size
from fedsim.report import table
from fedsim.seeding import numpy_generator
from fedsim.shapes import adapter_of, model_shape, skeleton
from fedsim.training.batches import collate, local_batches, pack
from fedsim.training.budget import GENERATED, LOSS_SHARE, Load, free_bytes, tokens_for_answers_on_gpu, tokens_on_cpu, tokens_on_gpu
from fedsim.training.labelled import encode_any
from fedsim.types import AnyEncoded, AnyExample, EncodedExample, Labelled

TRAIN_SIZES = {"gsm8k": 7473, "math": 7500, "metamathqa": 395_000, "commonsense_170k": 170_420}
TEST_SIZES = {"gsm8k": 1319, "math": 5000, "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10_042, "winogrande": 1267}
TEST_SIZES |= {"ARC-Challenge": 1172, "ARC-Easy": 2376, "openbookqa": 500}
TRAIN_SIZES |= {"snli": 549_367, "sick": 8935}
TEST_SIZES |= {"snli": 9824, "sick": 992}
"""Number of examples, as loaded, of sets that may not be on this machine."""

TOKENS = {"snli": 26, "sick": 23}
"""Tokens of an example under BERT's tokenizer, for sets where data.max_length / 2 is a poor guess."""

SAMPLED = 400
"""Number of examples whose length is measured."""

TOKENS_A_WORD = 1.4
"""Includes the tokens that a tokenizer adds around texts; used if the model's tokenizer is not on this machine."""

MEGABITS = 100.0

TIME_FACTOR, MEMORY_FACTOR = 1.65, 1.36
"""The largest factors by which total time and peak memory were off on the two machines of experiments/results/benchmarks*.json."""


@dataclass(frozen=True)
class Answer:
    """An estimate and what it is based on."""

    config: Config
    spec: AdapterSpec
    shape: ModelShape
    work: Work
    rates: Calibration
    found: Estimate
    megabits: float
    assumptions: tuple[str, ...]

    @property
    def network_seconds(self) -> float:
        """Seconds that one client's transfers would take if the client were a machine of its own."""
        moved = sum(number for name, number in self.found.num_bytes.items() if name.endswith("payload_bytes"))
        return moved / self.config.federation.clients * 8 / (self.megabits * 1e6)


def estimate_of(
    given: Config, *, tokens: int | None = None, megabits: float = MEGABITS, again: bool = False, rates: Calibration | None = None
) -> Answer:
    """Returns the estimate of a run of `given`. `tokens` is the mean length of an example if the data is not on this machine.

    `rates` default to this machine's, which are measured if necessary. Raises UserError for a model without known shapes and for data that
    cannot be read.
    """
    config, method = effective(given), method_of(given)
    data = _data(given.data, given.seed)
    classes, texts = (data.labels, data.texts) if data else (labels(given.data) or (), 2)
    settings = skeleton(given.model, classes, texts).config
    check_architecture(given.model.path or str(EMBEDDED), settings, classes)
    spec, shape = adapter_of(config, method, classes, texts), model_shape(given.model, classes, texts)
    given, config = (_with_passes(each, shape, Load.of(config, spec, method)) for each in (given, config))
    limit = min(given.data.max_length, context(settings, classes) or given.data.max_length)
    work, notes = _counted(config, data, limit) if data else _assumed(config, tokens, limit)
    rates = rates or calibrated(config, method, spec, max(4, round(work.tokens)), classes, texts, again=again)
    found = estimate(config, method, spec, shape, work, rates, forecast(config, method, spec))
    return Answer(given, spec, shape, work, rates, found, megabits, (*notes, *_assumptions(config, spec, work, rates)))


def _with_passes(config: Config, shape: ModelShape, load: Load) -> Config:
    """Returns the configuration with tokens_per_pass=auto, of training and evaluation, resolved for this machine."""
    training, evaluation = config.training, config.evaluation
    on, asked = device(config.model), (training.tokens_per_pass, evaluation.tokens_per_pass)
    found = tokens_on_cpu(), GENERATED
    if AUTO in asked and on.type == "cuda":
        free = max(0, free_bytes(on) - shape.parameters * shape.weight_bytes)
        found = tokens_on_gpu(shape, load, free, checkpointing=training.activation_checkpointing), tokens_for_answers_on_gpu(shape, free)
    most, answers = (choice if given == AUTO else int(given) for given, choice in zip(asked, found, strict=True))
    answers //= LOSS_SHARE if labels(config.data) != () else 1  # classification is evaluated in passes, as losses are
    return replace(config, training=replace(training, tokens_per_pass=most), evaluation=replace(evaluation, tokens_per_pass=answers))


_ANSWERS = "The base model's answers run to evaluation.max_new_tokens (whole texts to less), later ones to the length of the references."


def _assumptions(config: Config, spec: AdapterSpec, work: Work, rates: Calibration) -> list[str]:
    notes = [
        f"Rates: {rates.source}; {rates.flops / 1e9:,.1f} GFLOP/s in training.",
        f"Error: against runs of models of up to 87 M parameters on a CPU, total time was off by up to {TIME_FACTOR:g} times and memory by "
        f"up to {MEMORY_FACTOR:g} times (docs/performance.md); a GPU is not in these figures.",
        "One process is server and worker. Start-up, the reading of data and the loading of weights come in addition.",
        *([] if spec.head else [_ANSWERS]),
        f"Clients have equal shares; a step is as long as its mean; padding adds {100 * (work.padded - 1):.0f} % to its tokens.",
    ]
    if config.privacy.secure_aggregation:
        notes.append("The masks and shares of secure aggregation are in the bytes, not in the time.")
    if config.engine.cohort_size == 0 and round_size(config.federation.clients, config.federation.fraction) > 1000:
        notes.append("All clients of a round train in one cohort: engine.cohort_size bounds the memory of their factors.")
    return notes


# ---- data


def _data(config: DataConfig, seed: int) -> Dataset | None:
    """Returns the data, or None if it is not on this machine but its size is known. Raises UserError if its size is unknown."""
    if _at_hand(config):
        return load(config, seed)
    sizes = ((config.train, TRAIN_SIZES), (config.test, TEST_SIZES))
    unknown = [name for names, known in sizes for name in names if name not in known]
    if unknown:
        raise UserError(f"data: {unknown[0]!r} is not on this machine and its size is not known. Name its folder: data.path=...")
    return None


def _at_hand(data: DataConfig) -> bool:
    if data.path is not None:
        return looks_local(data.path) or Path(data.path).exists()
    return data.train == ["embedded"] and data.test == ["embedded"]


def _assumed(config: Config, tokens: int | None, limit: int) -> tuple[Work, list[str]]:
    """Returns assumed numbers and lengths of examples for sets that are not on this machine, and a note on them."""
    data = config.data
    length = tokens or min(limit, round(mean(TOKENS.get(name, data.max_length // 2) for name in data.train)))
    response = 0 if labels(data) else length / 2
    kept = data.train_examples or sum(TRAIN_SIZES[name] for name in data.train)
    most = data.test_examples or max(TEST_SIZES.values())
    questions = sum(min(most, TEST_SIZES[name]) for name in data.test)
    answer = min(response, config.evaluation.max_new_tokens)
    work = Work(length, response, kept, questions, length - response, answer, 2 if config.model.pairs is PairReading.apart else 1)
    parts = ", half of them response" if response else ""
    notes = f"Data are not on this machine: {kept:,} examples of {length} tokens (--tokens=){parts}; {questions:,} test examples."
    return work, [notes]


def _counted(config: Config, data: Dataset, limit: int) -> tuple[Work, list[str]]:
    """Returns the number of examples and a sample's lengths, and a note if the model's tokenizer is missing."""
    apart = config.model.pairs is PairReading.apart
    tests = [example for examples in data.test.values() for example in examples]
    train, questions = (_sample(examples, config.seed) for examples in (data.train, tests))
    tokenizer, padded, notes = local_tokenizer(config.model, data.labels), PADDED, []
    if tokenizer is None:
        lengths, asked = ([_by_words(example, limit) for example in each] for each in (train, questions))
        notes = [f"Tokens of the data: {TOKENS_A_WORD} for each word, as the model's tokenizer is not on this machine."]
    else:
        in_tests = replace(config.data, train_on=TrainOn.response)
        kinds = ((train, config.data), (questions, in_tests))
        encoded, of_tests = (encode_any(each, tokenizer, how, apart=apart) for each, how in kinds)
        lengths, asked, padded = _lengths(encoded), _lengths(of_tests), _positions_per_token(config, encoded)
    work = Work(
        tokens=mean(whole for whole, _ in lengths),
        responses=mean(whole - start for whole, start in lengths),
        train_examples=len(data.train),
        questions=len(tests),
        prompt=mean(start for _, start in asked),
        answer=mean(whole - start for whole, start in asked),
        sequences=data.texts if apart else 1,
        padded=padded,
    )
    return work, notes


def _sample(examples: Sequence[AnyExample], seed: int) -> list[AnyExample]:
    count = min(SAMPLED, len(examples))
    return [examples[i] for i in numpy_generator(seed, "estimate").choice(len(examples), count, replace=False)]


def _lengths(encoded: Sequence[AnyEncoded]) -> list[tuple[float, float]]:
    """Returns (tokens, tokens without loss) of each example; in a classification row no token has a loss."""
    return [(each.num_tokens, each.loss_start if isinstance(each, EncodedExample) else each.num_tokens) for each in encoded]


def _by_words(example: AnyExample, limit: int) -> tuple[float, float]:
    """Returns an example's `_lengths`, approximated from its words and truncated as for training."""
    first, *others = (" ".join(example.texts),) if isinstance(example, Labelled) else (example.prompt, example.response)
    start = len(first.split())
    whole = start + sum(len(text.split()) for text in others)
    return min(limit, TOKENS_A_WORD * whole), min(limit, TOKENS_A_WORD * start)


def _positions_per_token(config: Config, encoded: Sequence[AnyEncoded]) -> float:
    """Returns the positions per token, padding included, when a cohort trains on the examples for one epoch as in a run."""
    training, drawn = replace(config.training, local_epochs=1), round_size(config.federation.clients, config.federation.fraction)
    clients = max(1, min(config.engine.cohort_size or drawn, drawn, len(encoded) // (training.batch_size * training.accumulation)))
    shards = [encoded[client::clients] for client in range(clients)]
    batches = [
        local_batches([example.num_tokens for example in shard], training, seed=config.seed, round=1, client=client)
        for client, shard in enumerate(shards)
    ]
    unit = 1 if config.privacy.unit is PrivacyUnit.example else training.batch_size
    positions = tokens = 0
    for step in zip(*batches, strict=False):
        rows = {client: [shards[client][i] for i in batch] for client, batch in enumerate(step)}
        for each in pack(rows, unit, int(training.tokens_per_pass)):
            batch = collate([row.example for row in each.rows], 0, CPU)
            positions, tokens = positions + batch.input_ids.numel(), tokens + batch.num_tokens
    return positions / tokens


# ---- output


def plain(answer: Answer) -> dict[str, Any]:
    """Returns plain values: seconds, bytes and tokens."""
    return {
        "method": answer.config.method.name,
        "model": answer.config.model.name,
        "parameters": answer.shape.parameters,
        "clients": answer.config.federation.clients,
        "rounds": answer.config.federation.rounds,
        "phases": {phase.name: phase.seconds for phase in answer.found.phases},
        "total_seconds": answer.found.seconds,
        "training_flops": answer.found.flops,
        "memory_bytes": answer.found.memory,
        "peak_memory_bytes": answer.found.peak_bytes,
        "bytes": answer.found.num_bytes,
        "network_seconds_a_client": answer.network_seconds,
        "work": asdict(answer.work),
        "calibration": asdict(answer.rates),
        "assumptions": list(answer.assumptions),
    }


def estimate_table(answer: Answer) -> str:
    """Returns the estimate as text."""
    federation, found = answer.config.federation, answer.found
    drawn = round_size(federation.clients, federation.fraction)
    rank = f", rank {answer.spec.rank}" if answer.spec.form.low_rank else ""
    title = (
        f"{answer.config.method.name}, {answer.config.model.name} ({answer.shape.parameters / 1e6:,.1f} M parameters){rank}, "
        f"{plural(federation.clients, 'client')}, {drawn:,} in a round, {plural(federation.rounds, 'round')}"
    )
    phases = [[phase.name, rough_duration(phase.seconds), phase.detail] for phase in found.phases]
    memory = [[name, size(round(number)), ""] for name, number in found.memory.items()]
    totals = {kind: found.num_bytes[f"{kind}_payload_bytes"] for kind in ("uplink", "downlink", "setup")}
    travelled = [[name, size(number), ""] for name, number in totals.items()]
    line = rough_duration(answer.network_seconds)
    travelled.append(["a client, on its own line", line, f"at {answer.megabits:g} Mbit/s, over the whole run"])
    blocks = [
        table(["phase", "time", ""], [*phases, ["total", rough_duration(found.seconds), ""]]),
        table(["memory at the peak", "", ""], [*memory, ["total", size(round(found.peak_bytes)), ""]]),
        table(["bytes that travel", "", ""], travelled),
    ]
    return "\n\n".join([title, *blocks, "\n".join(map(_item, answer.assumptions))])


def _item(text: str) -> str:
    return textwrap.fill(text, width(), initial_indent="- ", subsequent_indent="  ")


def rough_duration(seconds: float) -> str:
    """Returns a time as text: "0.4 s", "12 s", "5.2 min", "3.1 h", "41 days", "2.3 years"."""
    units = ((60.0, 1.0, "s"), (3600.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"), (730 * 86400.0, 86400.0, "days"))
    unit, name = next(((unit, name) for below, unit, name in units if seconds < below), (365.25 * 86400.0, "years"))
    value = seconds / unit
    return f"{value:,.{0 if value >= 10 else 1}f} {name}"

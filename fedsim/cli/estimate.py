"""`fedsim estimate`: how long a run will take, what memory and what bytes, from shapes and a few seconds of measuring on this machine.

Nothing is trained, and no weight is loaded: bytes are those of `fedsim cost`, the arithmetic is in `fedsim.core.estimate`.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from fedsim.calibration import calibrated
from fedsim.choices import AUTO, TrainOn
from fedsim.cli.calling import width
from fedsim.config import Config, DataConfig
from fedsim.core.cost import forecast
from fedsim.core.estimate import Calibration, Estimate, Work, estimate
from fedsim.core.forms import AdapterSpec
from fedsim.core.memory import ModelShape
from fedsim.core.participation import round_size
from fedsim.data import Dataset, labels, load
from fedsim.effective import effective, method_of
from fedsim.errors import UserError
from fedsim.models import EMBEDDED, device, looks_local
from fedsim.progress import plural, size
from fedsim.report import table
from fedsim.seeding import numpy_generator
from fedsim.shapes import adapter_of, model_shape
from fedsim.training.budget import GENERATED, Load, chosen_for, chosen_for_answers_within, chosen_on_cpu, free_bytes
from fedsim.training.encoding import encode
from fedsim.types import AnyExample, Example

TRAIN_SIZES = {"gsm8k": 7473, "math": 7500, "metamathqa": 395_000, "commonsense_170k": 170_420}
TEST_SIZES = {"gsm8k": 1319, "math": 5000, "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "hellaswag": 10_042, "winogrande": 1267}
TEST_SIZES |= {"ARC-Challenge": 1172, "ARC-Easy": 2376, "openbookqa": 500}
"""Examples of the sets that are not on this machine, as their authors give them."""

SAMPLED = 400
"""Examples whose length is looked at."""

TOKENS_A_WORD = 1.4
"""Where the model's tokenizer is not on this machine."""

MEGABITS = 100.0

TIME_FACTOR, MEMORY_FACTOR = 1.65, 1.36
"""By what factor total time and peak memory were off at most on the two machines of experiments/results/benchmarks*.json."""


@dataclass(frozen=True)
class Answer:
    """The estimate with what it rests on."""

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
        """Seconds in which one client sends and receives what is its own, were it a machine of its own."""
        moved = sum(number for name, number in self.found.num_bytes.items() if name.endswith("payload_bytes"))
        return moved / self.config.federation.clients * 8 / (self.megabits * 1e6)


def estimate_of(
    given: Config, *, tokens: int | None = None, megabits: float = MEGABITS, again: bool = False, rates: Calibration | None = None
) -> Answer:
    """Returns the estimate of a run of `given`. `tokens` is the mean length of an example where the data are not at hand.

    `rates` are those of this machine, measured if need be, unless others are given.

    Raises UserError for a model without known shapes and for data that cannot be read.
    """
    if labels(given.data) != ():
        raise UserError("data: expected texts that are answered, got labels; an estimate of classification is not known. Use fedsim cost.")
    config, method = effective(given), method_of(given)
    spec, shape = adapter_of(config, method, ()), model_shape(given.model)
    given, config = (_with_passes(each, shape, Load.of(config, spec, method)) for each in (given, config))
    work, told = _work(given, tokens)
    rates = rates or calibrated(config, method, spec, max(4, round(work.tokens)), again=again)
    found = estimate(config, method, spec, shape, work, rates, forecast(config, method, spec))
    return Answer(given, spec, shape, work, rates, found, megabits, (*told, *_assumptions(config, rates)))


def _with_passes(config: Config, shape: ModelShape, load: Load) -> Config:
    """Returns the configuration with the most tokens of a pass and of a generation batch chosen for this machine where it says auto."""
    training, evaluation = config.training, config.evaluation
    on, asked = device(config.model), (training.tokens_per_pass, evaluation.tokens_per_pass)
    found = chosen_on_cpu(), GENERATED
    if AUTO in asked and on.type == "cuda":
        free = max(0, free_bytes(on) - shape.parameters * shape.weight_bytes)
        found = chosen_for(shape, load, free, checkpointing=training.activation_checkpointing), chosen_for_answers_within(shape, free)
    most, answers = (choice if given == AUTO else int(given) for given, choice in zip(asked, found, strict=True))
    return replace(config, training=replace(training, tokens_per_pass=most), evaluation=replace(evaluation, tokens_per_pass=answers))


def _assumptions(config: Config, rates: Calibration) -> list[str]:
    told = [
        f"Rates: {rates.source}; {rates.flops / 1e9:,.1f} GFLOP/s in training.",
        f"Error: against runs of models of up to 87 M parameters on a CPU, total time was off by up to {TIME_FACTOR:g} times and memory by "
        f"up to {MEMORY_FACTOR:g} times (docs/performance.md); a GPU is not in these figures.",
        "One process is server and worker. Start-up, the reading of data and the loading of weights come in addition.",
        "The base model's answers run to evaluation.max_new_tokens (whole texts to less), later ones to the length of the references.",
        "Clients have equal shares; a step is as long as its mean; padding adds a twelfth to the time of training.",
    ]
    if config.privacy.secure_aggregation:
        told.append("The masks and shares of secure aggregation are in the bytes, not in the time.")
    if config.engine.cohort_size == 0 and round_size(config.federation.clients, config.federation.fraction) > 1000:
        told.append("All clients of a round train in one cohort: engine.cohort_size bounds the memory of their factors.")
    return told


# ---- data


def _work(config: Config, tokens: int | None) -> tuple[Work, list[str]]:
    """Returns the examples and their lengths, and what was assumed of them."""
    if _at_hand(config.data):
        return _counted(config, load(config.data, config.seed))
    unknown = [name for name in config.data.train if name not in TRAIN_SIZES] + [
        name for name in config.data.test if name not in TEST_SIZES
    ]
    if unknown:
        raise UserError(f"data: {unknown[0]!r} is not on this machine and its size is not known. Name its folder: data.path=...")
    length = tokens or config.data.max_length // 2
    kept = config.data.train_examples or sum(TRAIN_SIZES.get(name, 0) for name in config.data.train)
    most = config.data.test_examples or max(TEST_SIZES.values())
    questions = sum(min(most, TEST_SIZES.get(name, 0)) for name in config.data.test)
    work = Work(length, length / 2, kept, questions, length / 2, min(length / 2, config.evaluation.max_new_tokens))
    return work, [
        f"Data are not on this machine: {kept:,} examples of {length} tokens (--tokens=), half of them response; {questions:,} questions."
    ]


def _at_hand(data: DataConfig) -> bool:
    if data.path is not None:
        return looks_local(data.path) or Path(data.path).exists()
    return data.train == ["embedded"] and data.test == ["embedded"]


def _counted(config: Config, data: Dataset) -> tuple[Work, list[str]]:
    tests = [example for examples in data.test.values() for example in examples]
    tokenizer = _tokenizer(config)
    train = _lengths(config, data.train, tokenizer, config.data.train_on)
    questions = _lengths(config, tests, tokenizer, TrainOn.response)
    told = [] if tokenizer else [f"Tokens of the data: {TOKENS_A_WORD} for each word, as the model's tokenizer is not on this machine."]
    work = Work(
        tokens=mean(whole for whole, _ in train),
        responses=mean(whole - start for whole, start in train),
        train_examples=len(data.train),
        questions=len(tests),
        prompt=mean(start for _, start in questions),
        answer=mean(whole - start for whole, start in questions),
    )
    return work, told


def _lengths(config: Config, examples: Sequence[AnyExample], tokenizer: Any, train_on: TrainOn) -> list[tuple[float, float]]:
    """Returns length and length of what has no loss of a seeded sample of the examples, cut as for training."""
    count, limit = min(SAMPLED, len(examples)), config.data.max_length
    drawn = [examples[i] for i in numpy_generator(config.seed, "estimate").choice(len(examples), count, replace=False)]
    chosen = [example for example in drawn if isinstance(example, Example)]
    if tokenizer is None:
        pairs = [(len(example.prompt.split()), len(example.response.split())) for example in chosen]
        return [(min(limit, TOKENS_A_WORD * (prompt + response)), min(limit, TOKENS_A_WORD * prompt)) for prompt, response in pairs]
    return [(each.num_tokens, each.loss_start) for each in encode(chosen, tokenizer, limit, train_on)]


def _tokenizer(config: Config) -> Any:
    """Returns the model's tokenizer if it is on this machine, None otherwise."""
    folder = EMBEDDED if config.model.path is None else Path(config.model.path)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


# ---- what is printed


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
    """Returns a time as one reads it: "0.4 s", "12 s", "5.2 min", "3.1 h", "41 days", "2.3 years"."""
    units = ((60.0, 1.0, "s"), (3600.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"), (730 * 86400.0, 86400.0, "days"))
    unit, name = next(((unit, name) for below, unit, name in units if seconds < below), (365.25 * 86400.0, "years"))
    value = seconds / unit
    return f"{value:,.{0 if value >= 10 else 1}f} {name}"

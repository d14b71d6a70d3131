"""The configuration: plain typed dataclasses; the line under a field is its help.

Hydra composes conf/ against these types (`fedsim.cli.compose`), `check` finds contradictions that need neither data
nor model, and nothing beyond the entry sees a DictConfig. Enum members are written by name: `training.optimizer=sgd`.
"""

import json
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Optional, Union, cast, get_args, get_origin

from fedsim.errors import UserError

AUTO = "auto"
"""Value of an option that is settled where data, model and device are known."""


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Init(Enum):
    gradient = "SVD of the first full fine-tuning step, estimated on a sample of the clients' data (LoRA-SB)"
    gradient_public = "the same, estimated on a public shard at the server"
    gradient_dp = "singular vectors of the clients' clipped and noised gradients; costs epsilon"
    weight_svd = "top singular vectors of the base weights (LoRA-XS); nothing is sent"
    orthogonal = "seeded random orthonormal bases; only the seed is sent"
    lora = "LoRA's own start: A uniform from the seed, B zero; only the seed is sent"
    zero = "no update"


class Residual(Enum):
    stacked = "the clients' factors side by side, as published"
    dense = "one matrix of the size of the weight"


class PrivacyUnit(Enum):
    none = "nothing is claimed"
    example = "one training example of a client"
    client = "one client with all its examples"


class Accountant(Enum):
    prv = "numerical, tight (privacy random variables)"
    rdp = "Renyi divergences; looser, fast"
    skellam = "Renyi divergences of whole orders: the one that holds for the clients' discrete noise under secure aggregation"


class NoiseSource(Enum):
    seed = "the run's seed: a run can be repeated, and whoever knows the seed can take the noise off"
    system = "the operating system of each client: holds against the server, and no run repeats another"


class ServerRule(Enum):
    mean = "weighted mean"
    median = "median of every entry"
    trimmed_mean = "mean of every entry without the largest and smallest"
    krum = "mean of the uploads that are nearest to their neighbours (multi-Krum)"


class OverNorm(Enum):
    refuse = "the client is left out of the round"
    clip = "the update is scaled down to the norm"


class Partition(Enum):
    iid = "every client draws from the same distribution"
    task = "each client holds examples of one task only"
    dirichlet = "each client's mixture is drawn from a Dirichlet distribution"


class DirichletOver(Enum):
    task = "mixture over tasks"
    label = "mixture over gold answers"


class Mode(Enum):
    sync = "a round waits for its clients"
    fedbuff = "clients work on, each from the version it was sent; every so many updates make a new one (FedBuff)"


class Weighting(Enum):
    examples = "by number of training examples"
    uniform = "equal"


class Optimizer(Enum):
    adamw = "AdamW"
    sgd = "SGD with momentum"


class Schedule(Enum):
    constant = "constant after warm-up"
    linear = "linear to zero after warm-up"
    cosine = "cosine to zero after warm-up"


class TrainOn(Enum):
    response = "loss on the response only"
    all = "loss on prompt and response"


class OnError(Enum):
    stop = "a malformed row ends the run with file, line and reason"
    skip = "malformed rows are left out, counted and reported"


@dataclass
class MethodConfig:
    name: str = "fed_sb"
    """What is trained, what travels and how the server combines it."""
    residual: Residual = Residual.stacked
    """FedEx-LoRA and FLoRA: how what is added to the base weights travels."""
    residual_rank: Optional[int] = None
    """FedEx-LoRA: send the best approximation of this rank of the residual; null sends all of it."""
    heads: int = 4
    """RAVAN: heads per layer, each of rank adapter.rank."""
    client_heads: Optional[int] = None
    """RAVAN: heads that a client trains in a round, drawn from the seed; null trains all."""


@dataclass
class ModelConfig:
    name: str = "embedded"
    """Name in tables and plots."""
    path: Optional[str] = None
    """Hugging Face model id or local folder; null is the small model inside the package."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json that fix the layers' shapes; they tell the cost of a model whose path is no folder on this machine."""
    dtype: Dtype = Dtype.float32
    """Type of the frozen base weights; the trained factors are always float32."""
    device: str = "auto"
    """Device of the base model: auto takes the first GPU if there is one."""


@dataclass
class AdapterConfig:
    rank: Optional[int] = None
    """Rank r: the trained matrix R of each adapted layer is r x r; null takes 64, or the smallest side of the layers if that is less."""
    init: Optional[Init] = None
    """Where the factors start, and with them the common bases B and A; null takes the method's own: gradient for Fed-SB."""
    refresh_every: int = 0
    """Fed-SB: after every k-th round add B R A to the base weights and compute new bases; 0 keeps the first ones."""
    init_samples: int = 100
    """Examples in all from which the initial gradient is estimated (gradient, gradient_public)."""
    scaling: float = 1.0
    """Scaling s of the update s B R A."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, by last part of their path; empty takes all of the architecture's blocks."""


@dataclass
class DataConfig:
    name: str = "embedded"
    """Name in tables and plots."""
    train: list[str] = field(default_factory=lambda: ["embedded"])
    """Training sets, by name."""
    test: list[str] = field(default_factory=lambda: ["embedded"])
    """Test sets, by name."""
    path: Optional[str] = None
    """Local file or folder, or hub name; null takes each set's own hub name."""
    train_examples: Optional[int] = None
    """Keep at most this many training examples in all; null keeps all."""
    test_examples: Optional[int] = None
    """Keep at most this many test examples of each task; null keeps all."""
    max_length: int = 512
    """Longest sequence in tokens; a longer training example is cut at its end."""
    train_on: TrainOn = TrainOn.response
    """Which tokens carry the loss."""
    on_error: OnError = OnError.stop
    """What a malformed row does."""
    owner: Optional[int] = None
    """The one client to which all training examples belong, as in a client's own worker; null deals them to the clients."""


@dataclass
class FederationConfig:
    clients: int = 25
    """Number of clients (data owners)."""
    rounds: int = 12
    """Number of rounds."""
    fraction: float = 1.0
    """Fraction of the clients that take part in a round, at least one."""
    weighting: Weighting = Weighting.examples
    """Weight of a client in the average."""
    partition: Partition = Partition.iid
    """How the training examples are dealt to the clients."""
    alpha: float = 0.5
    """Dirichlet concentration; smaller is more skewed."""
    dirichlet_over: DirichletOver = DirichletOver.task
    """What the Dirichlet mixture is over."""
    quantity_sigma: float = 0.0
    """Log-normal sigma of the clients' numbers of examples; 0 deals equal shares."""
    ranks: dict[int, float] = field(default_factory=dict)
    """Clients of different rank, as {rank: share of the clients}; empty gives every client adapter.rank."""
    dropout: float = 0.0
    """Simulation: probability that a client vanishes in mid-round, before its upload; with secure aggregation as often after it, too."""
    network: str = "none"
    """Simulation: links that turn bytes and tokens into seconds: none, uniform, broadband, mobile, or a YAML or CSV file of links."""
    deadline: Optional[float] = None
    """Simulated network: seconds after which a round goes on without those that are late, if min_replies are there; null waits for all."""
    mode: Mode = Mode.sync
    """How updates are brought together; fedbuff needs a simulated network, and a round is one new version."""
    concurrency: Optional[int] = None
    """fedbuff: clients that work at the same time; null takes fraction of them."""
    buffer: Optional[int] = None
    """fedbuff: updates that make a new version; null takes half of concurrency."""
    round_timeout: Optional[float] = None
    """Seconds after which a round goes on without the clients that have not replied; null waits for all that are alive."""
    min_replies: float = 0.5
    """Clients that a round needs: a part of those it wants if below 1, otherwise their number. Simulated drop-outs do not count."""
    over_selection: float = 0.0
    """Draw this part more clients than a round wants; it goes on when as many as it wants have replied."""
    retries: int = 2
    """How often clients that have not replied are asked again where fewer than min_replies have; after that the run stops."""
    max_examples: int = 1_000_000
    """Most training examples that a client may claim to have; the number is its weight in the average."""


@dataclass
class TrainingConfig:
    optimizer: Optimizer = Optimizer.adamw
    """Optimizer of each client's local training; its state starts anew in every round."""
    learning_rate: float = 3e-2
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained factors."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW: term added to the denominator."""
    momentum: float = 0.0
    """SGD: momentum."""
    schedule: Schedule = Schedule.cosine
    """Learning rate over all local steps of all rounds."""
    warmup_ratio: float = 0.02
    """Part of all steps in which the learning rate rises linearly to its peak."""
    batch_size: int = 4
    """Examples per client and micro-batch."""
    accumulation: int = 1
    """Micro-batches per local step."""
    local_steps: int = 10
    """Local optimizer steps of a client per round."""
    local_epochs: Optional[int] = None
    """Passes over a client's examples per round; when set, it takes the place of local_steps."""
    group_by_length: bool = True
    """Put examples of similar length into the same batch."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass to save memory."""
    tokens_per_pass: Union[int, str] = AUTO
    """Most tokens (padding included) in one forward and backward pass, to which a cohort's step is cut; auto chooses for the device."""
    proximal_mu: float = 0.0
    """FedProx: weight mu of the pull mu/2 |x - x_start|^2 towards the start of the round."""
    scaffold: bool = False
    """SCAFFOLD: control variates against drift; they travel both ways with the factors. Needs training.optimizer=sgd without momentum."""


@dataclass
class ServerConfig:
    rule: ServerRule = ServerRule.mean
    """How the clients' uploads become one."""
    trimmed: float = 0.1
    """trimmed_mean: part of the clients that is left out at each end."""
    malicious: int = 0
    """krum: number of clients that may be malicious."""
    kept: int = 0
    """krum: number of uploads that are averaged; 0 averages all but the malicious."""
    optimizer: str = "fedavg"
    """What the server does with the averaged update: fedavg, fedavgm, fedadam, fedyogi or fedadagrad."""
    learning_rate: float = 1.0
    """Server learning rate."""
    momentum: float = 0.9
    """Momentum of fedavgm; first moment's decay of the adaptive ones."""
    beta2: float = 0.99
    """Second moment's decay of fedadam and fedyogi."""
    tau: float = 1e-3
    """Adaptivity: term added to the denominator of the adaptive ones."""
    max_update_norm: Optional[float] = 1e6
    """Largest L2 norm of a client's update that is believed; null believes all that are finite."""
    over_norm: OverNorm = OverNorm.refuse
    """What is done with an update beyond max_update_norm."""


@dataclass
class CompressionConfig:
    name: str = "none"
    """How an upload is compressed: none, bfloat16, int8, int4 or top_k."""
    density: float = 0.01
    """top_k: part of the entries that is sent."""
    error_feedback: bool = False
    """A client adds what compression cost to its next upload."""


@dataclass
class PrivacyConfig:
    unit: PrivacyUnit = PrivacyUnit.none
    """What differential privacy protects."""
    epsilon: Optional[float] = None
    """Budget of every client over the whole run, initialisation included; without noise_multiplier the noise is calibrated to it."""
    noise_multiplier: Optional[float] = None
    """Standard deviation of the noise in units of clip_norm; null calibrates it to epsilon."""
    clip_norm: float = 1.0
    """Largest L2 norm of an example's gradient, or of a client's update, over all layers."""
    delta: Optional[float] = None
    """Delta of every client; null takes 1 / n^1.1 of its examples, or of the clients. One of 1 / n or more is refused."""
    accountant: Accountant = Accountant.prv
    """How epsilon is computed; with noise of the clients under secure aggregation always by skellam."""
    init_share: float = 0.2
    """adapter.init=gradient_dp: part of epsilon that the initialisation may spend."""
    init_noise_multiplier: Optional[float] = None
    """adapter.init=gradient_dp: its noise; null calibrates it to init_share x epsilon."""
    adaptive_clip: bool = False
    """unit=client: let clip_norm follow a quantile of the updates' norms; the noised counts are in the price."""
    clip_quantile: float = 0.5
    """unit=client, adaptive_clip: the quantile."""
    clip_rate: float = 0.2
    """unit=client, adaptive_clip: learning rate of the clip norm's logarithm."""
    unsafe_init: bool = False
    """Allow adapter.init=gradient, which leaks, with privacy: for audits only; no epsilon is claimed then."""
    secure_aggregation: bool = False
    """The server sees sums of uploads only (SecAgg+, see secure), of linear methods. With unit=client the clients add the noise."""


@dataclass
class SecureConfig:
    bits: int = 16
    """Secure aggregation: bits of a value of an upload; with its sum's carry bits, in whole bytes, it is what travels."""
    range: float = 1.0
    """Largest change of an entry in a round that an upload can hold; what is larger is clipped, and counted. unit=client: clip_norm."""
    gradient_range: float = 16.0
    """The same for an entry of a client's initial gradient, which travels in 32 bits; with gradient_dp at least 8 times its noise."""
    threshold: float = 0.6
    """Part of the round's clients that must stay to the end; with fewer the round is given up. unit=client: sized to give all the noise."""
    neighbours: int = 0
    """Clients with which each shares masks and secrets (an even number); 0 takes all others."""
    noise: NoiseSource = NoiseSource.seed
    """unit=client: where the clients' noise comes from."""


@dataclass
class AuditConfig:
    canaries: int = 0
    """Examples of random tokens, dealt to the clients in turn, each put into its client's data by a coin from the seed; 0 puts in none."""
    confidence: float = 0.95
    """Probability with which the lower bound on epsilon holds."""


@dataclass
class EvaluationConfig:
    every: int = 0
    """Evaluate after every k-th round as well; 0 evaluates before the first and after the last only."""
    max_new_tokens: int = 96
    """Longest generated answer in tokens."""
    tokens_per_pass: int = 16384
    """Most tokens (prompt, answer and padding) in one generation batch."""
    diagnosis: bool = True
    """After every round measure how exact the average is, how far clients drift apart, and the effective rank of the update."""


@dataclass
class EngineConfig:
    name: str = "inprocess"
    """Which Flower Grid carries the messages."""
    superlink: Optional[str] = None
    """deployment: name of the SuperLink in Flower's configuration (flwr config list)."""
    wait_seconds: float = 120.0
    """deployment: how long clients that are not connected are waited for when a run begins; afterwards a round goes on without them."""
    actors: Optional[int] = None
    """ray: worker processes, each with a GPU or core and a base model of its own; null takes one per GPU, else one per core."""
    address: Optional[str] = None
    """ray: address of a Ray cluster that is running (auto finds one on this machine); null starts Ray here, for this run."""
    cohort_size: int = 0
    """Clients that a worker trains together in one message; 0 takes all of the round's clients."""


@dataclass
class Config:
    """A whole experiment. Everything that can change a result is in here."""

    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    seed: int = 0
    """Seed of everything random: data, partition, choice of clients, batches, bases."""
    run_dir: Optional[str] = None
    """Run folder; null makes runs/<date>/<time>-<method>."""
    resume: bool = False
    """Go on from the last checkpoint of run_dir."""
    overwrite: bool = False
    """Replace a finished or interrupted run in run_dir."""


def to_dict(config: Any) -> Any:
    """Returns nested plain values (enums by name) that YAML and JSON can hold."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    return config


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """Returns the dataclass `schema` of the nested plain values that `to_dict` gives. Raises UserError for unknown or missing names."""
    names = {f.name: f.type for f in fields(schema)}
    if set(values) != set(names):
        odd = sorted(set(values) ^ set(names))
        raise UserError(
            f"configuration: expected the options {', '.join(names)} of {schema.__name__}, got a difference in {', '.join(odd)}."
        )
    return schema(**{name: _from_plain(kind, values[name], f"{schema.__name__}.{name}") for name, kind in names.items()})


def from_text(text: str) -> Config:
    """Returns the configuration of the JSON that `to_dict` gives. Raises UserError for anything else, whatever it is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"configuration: expected JSON, got {text!r:.60}.") from None
    return cast(Config, _from_plain(Config, values, "Config"))


def _from_plain(kind: Any, value: Any, name: str) -> Any:
    """Returns the value of this type. Raises UserError for one of another type: what comes over a network is not believed."""
    if get_origin(kind) is Union:
        return value if type(value) in get_args(kind) else _from_plain(get_args(kind)[0], value, name)
    if is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if get_origin(kind) in (list, dict) and isinstance(value, get_origin(kind)):
        return _from_items(kind, value, name)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise UserError(f"configuration: expected {name} to be {kind!s:.60}, got {value!r:.60}.")


def _from_items(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is list:
        return [_from_plain(get_args(kind)[0], each, name) for each in value]
    key_kind, item_kind = get_args(kind)
    try:
        return {key_kind(key): _from_plain(item_kind, each, name) for key, each in value.items()}
    except ValueError:
        raise UserError(f"configuration: expected the names in {name} to be {key_kind.__name__}, got {value!r:.60}.") from None


@dataclass(frozen=True)
class Bounds:
    """Finite numbers between `low` and `high`; an open end is not itself allowed."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        lower = f"{'>' if self.low_open else '>='} {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and {'<' if self.high_open else '<='} {self.high:g}"


_AT_LEAST_ONE, _NOT_NEGATIVE, _POSITIVE, _DECAY = Bounds(1), Bounds(0), Bounds(0, low_open=True), Bounds(0, 1, high_open=True)

MAY_BE_AUTO = ("training.tokens_per_pass",)
"""Options that are numbers or `AUTO`."""

BOUNDS = {
    "method.residual_rank": _AT_LEAST_ONE,
    "method.heads": _AT_LEAST_ONE,
    "method.client_heads": _AT_LEAST_ONE,
    "adapter.refresh_every": _NOT_NEGATIVE,
    "training.proximal_mu": _NOT_NEGATIVE,
    "server.trimmed": Bounds(0, 0.5, high_open=True),
    "server.malicious": _NOT_NEGATIVE,
    "server.kept": _NOT_NEGATIVE,
    "server.learning_rate": _POSITIVE,
    "server.momentum": _DECAY,
    "server.beta2": _DECAY,
    "server.tau": _POSITIVE,
    "compression.density": Bounds(0, 1, low_open=True),
    "privacy.epsilon": _POSITIVE,
    "privacy.noise_multiplier": _NOT_NEGATIVE,
    "privacy.clip_norm": _POSITIVE,
    "privacy.delta": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.init_share": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.init_noise_multiplier": _NOT_NEGATIVE,
    "privacy.clip_quantile": Bounds(0, 1, low_open=True, high_open=True),
    "privacy.clip_rate": _POSITIVE,
    "secure.bits": Bounds(2, 24),
    "secure.range": _POSITIVE,
    "secure.gradient_range": _POSITIVE,
    "secure.threshold": Bounds(0.5, 1, low_open=True),
    "secure.neighbours": _NOT_NEGATIVE,
    "federation.deadline": _POSITIVE,
    "federation.concurrency": _AT_LEAST_ONE,
    "federation.buffer": _AT_LEAST_ONE,
    "federation.dropout": Bounds(0, 1, high_open=True),
    "adapter.rank": _AT_LEAST_ONE,
    "adapter.init_samples": _AT_LEAST_ONE,
    "adapter.scaling": _POSITIVE,
    "data.train_examples": _AT_LEAST_ONE,
    "data.test_examples": _AT_LEAST_ONE,
    "data.max_length": Bounds(8),
    "data.owner": _NOT_NEGATIVE,
    "federation.clients": _AT_LEAST_ONE,
    "federation.rounds": _AT_LEAST_ONE,
    "federation.fraction": Bounds(0, 1, low_open=True),
    "federation.alpha": _POSITIVE,
    "federation.quantity_sigma": _NOT_NEGATIVE,
    "federation.round_timeout": _POSITIVE,
    "federation.min_replies": _POSITIVE,
    "federation.over_selection": _NOT_NEGATIVE,
    "federation.retries": _NOT_NEGATIVE,
    "federation.max_examples": _AT_LEAST_ONE,
    "server.max_update_norm": _POSITIVE,
    "training.learning_rate": _POSITIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.beta1": _DECAY,
    "training.beta2": _DECAY,
    "training.epsilon": _POSITIVE,
    "training.momentum": _DECAY,
    "training.warmup_ratio": _DECAY,
    "training.batch_size": _AT_LEAST_ONE,
    "training.accumulation": _AT_LEAST_ONE,
    "training.local_epochs": _AT_LEAST_ONE,
    "training.local_steps": _AT_LEAST_ONE,
    "training.tokens_per_pass": _AT_LEAST_ONE,
    "audit.canaries": _NOT_NEGATIVE,
    "audit.confidence": Bounds(0, 1, low_open=True, high_open=True),
    "evaluation.every": _NOT_NEGATIVE,
    "evaluation.max_new_tokens": _AT_LEAST_ONE,
    "evaluation.tokens_per_pass": _AT_LEAST_ONE,
    "engine.cohort_size": _NOT_NEGATIVE,
    "engine.actors": _AT_LEAST_ONE,
    "engine.wait_seconds": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
}
"""Allowed values of the options that are numbers; null is allowed where the type allows it."""


def check(config: Config) -> None:
    """Raises UserError for the first value or contradiction that can be seen without data and model."""
    for key, bounds in BOUNDS.items():
        value = _value(config, key)
        if value == AUTO and key in MAY_BE_AUTO:
            continue
        if isinstance(value, str):
            raise UserError(f"Expected {key} to be {AUTO} or a number {bounds}, got {value!r}. Give {key}= one of them.")
        if value is not None and value not in bounds:
            raise UserError(f"Expected {key} {bounds}, got {value}. Give {key}= a value in that range.")
    for key in ("data.train", "data.test", "adapter.target_modules"):
        _check_names(key, _value(config, key))
    for key in ("model.path", "data.path", "run_dir"):
        if _value(config, key) == "":
            raise UserError(f"Expected {key} to name something, got an empty text. Write {key}=null for none.")
    _check_contradictions(config)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_names(key: str, names: list[str]) -> None:
    if not names and key != "adapter.target_modules":
        raise UserError(f"Expected at least one name in {key}, got an empty list. Write {key}=[name].")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"Expected each name in {key} once, got {repeated[0]!r} more than once. Leave out the repetition.")


def _check_contradictions(config: Config) -> None:
    if config.resume and config.overwrite:
        raise UserError("Expected resume=true or overwrite=true, got both. Resume goes on with a run, overwrite starts it anew: drop one.")
    if config.resume and config.run_dir is None:
        raise UserError("Expected run_dir with resume=true, got none. Name the folder of the run to go on with: run_dir=...")
    examples = config.data.train_examples
    if examples is not None and examples < config.federation.clients:
        raise UserError(
            f"Expected at least one training example for each client, got data.train_examples={examples} and "
            f"federation.clients={config.federation.clients}. Raise the first or lower the second."
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.model.device):
        raise UserError(f"Expected model.device auto, cpu, cuda, cuda:<number> or mps, got {config.model.device!r}. Choose one of them.")

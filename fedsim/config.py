"""The configuration as typed dataclasses; the docstring under a field is its help text.

Hydra composes conf/ against these types (`fedsim.cli.compose`); no code after that sees a DictConfig.
"""

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from fedsim.choices import (
    AUTO,
    Accountant,
    DirichletOver,
    Dtype,
    Init,
    Mode,
    NoiseSource,
    OnError,
    Optimizer,
    OverNorm,
    PairReading,
    Partition,
    PrivacyUnit,
    Residual,
    Schedule,
    ServerRule,
    TrainOn,
    Weighting,
)


@dataclass
class MethodConfig:
    name: str = "fed_sb"
    """Federated method: what clients train and send, and how the server combines it."""
    residual: Residual = Residual.stacked
    """FedEx-LoRA and FLoRA: the form in which the change of the base weights is sent."""
    residual_rank: Optional[int] = None
    """FedEx-LoRA: send only the residual's best approximation of this rank; null sends the whole residual."""
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
    """Entries of config.json that determine the layers' shapes, to compute the cost of a model that is not on this machine."""
    dtype: Dtype = Dtype.float32
    """Type of the frozen base weights; the trained factors are always float32."""
    device: str = "auto"
    """Device of the base model: auto takes the first GPU if there is one."""
    pairs: PairReading = PairReading.together
    """How an encoder reads the two texts of a classified row; apart also takes the mean of the token states of a single text."""


@dataclass
class AdapterConfig:
    rank: Optional[int] = None
    """Rank r: the trained matrix R of each adapted layer is r x r; null takes 64, or the smallest side of the layers if that is less."""
    init: Optional[Init] = None
    """How the factors are initialised, the common bases B and A included; null takes the method's default: for Fed-SB gradient, or
    weight_svd with privacy."""
    refresh_every: int = 0
    """Fed-SB: after every k-th round add B R A to the base weights and compute new bases; 0 keeps the first ones."""
    init_samples: int = 100
    """Total number of examples from which the initial gradient is estimated. Clients give equal shares; one with fewer examples than its
    share gives all it has. gradient_dp: the expected number, since each example is drawn independently."""
    sketch: bool = False
    """Send sketches of the initial gradients instead of whole matrices: a few times rank numbers per row and column, for layers where that
    is at most half the matrix. A 7B model at rank 200 takes a seventh of the bytes and memory; the bases train nearly as well."""
    scaling: float = 1.0
    """Scaling s of the update s B R A."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, by the last part of their path; empty takes all those in the architecture's blocks."""


@dataclass
class DataConfig:
    name: str = "embedded"
    """Name in tables and plots."""
    train: list[str] = field(default_factory=lambda: ["embedded"])
    """Training sets, by name."""
    test: list[str] = field(default_factory=lambda: ["embedded"])
    """Test sets, by name."""
    path: Optional[str] = None
    """Local file or folder, or hub name; null takes each set's own hub name (instructions and classification have none)."""
    labels: list[str] = field(default_factory=list)
    """classification: the labels, in the order of the model's outputs; empty takes the sorted labels of the training rows. Required in a
    deployment, where no process sees all rows."""
    train_examples: Optional[int] = None
    """Keep at most this many training examples in total; null keeps all."""
    test_examples: Optional[int] = None
    """Keep at most this many test examples of each task; null keeps all."""
    max_length: int = 512
    """Longest sequence in tokens; a longer training example is cut at its end, a conversation first at its beginning."""
    train_on: TrainOn = TrainOn.response
    """Which tokens carry the loss."""
    client_column: Optional[str] = None
    """Column of the training rows that names their owner, for federation.partition=natural; null if there is none."""
    task_column: Optional[str] = None
    """Column that names the task of a row: results are reported and partitions skewed by task; null takes the set's name."""
    on_error: OnError = OnError.stop
    """What happens when a row is malformed."""
    token_cache: bool = True
    """Cache the tokens of large training data in ~/.cache/fedsim/tokens for later runs; the folder may be deleted at any time."""
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
    dirichlet_over: Optional[DirichletOver] = None
    """What the Dirichlet mixture is over; null takes label if the data is classified and data.task_column names no tasks, else task."""
    quantity_sigma: float = 0.0
    """Log-normal sigma of the clients' numbers of examples; 0 deals equal shares."""
    ranks: dict[int, float] = field(default_factory=dict)
    """Ranks of the clients, as {rank: share of the clients}; empty gives every client adapter.rank."""
    dropout: float = 0.0
    """Simulation: probability that a client drops out mid-round, before its upload; with secure aggregation, as often after it too."""
    network: str = "none"
    """Simulation: links that turn bytes and tokens into seconds: none, uniform, broadband, mobile, or a YAML or CSV file of links."""
    deadline: Optional[float] = None
    """Simulated network: seconds after which a round continues without late clients if min_replies have arrived; null waits for all."""
    mode: Mode = Mode.sync
    """How updates are combined; fedbuff needs a simulated network, and each of its rounds is one new version of the factors."""
    concurrency: Optional[int] = None
    """fedbuff: number of clients that train at the same time; null takes federation.fraction of them."""
    buffer: Optional[int] = None
    """fedbuff: number of updates that make a new version; null takes half of concurrency."""
    round_timeout: Optional[float] = None
    """Seconds to wait for replies, restarted for each retry and each stage of secure aggregation. The round then continues without the
    missing clients. null waits for all that are alive."""
    min_replies: float = 0.5
    """Replies that a round needs: a fraction of the selected clients if below 1, else a count. Simulated drop-outs do not count."""
    over_selection: float = 0.0
    """Select this fraction more clients than the round needs; it continues as soon as enough have replied."""
    retries: int = 2
    """How often missing clients are asked again if fewer than min_replies have replied; after that the run stops."""
    max_examples: int = 1_000_000
    """Largest number of training examples that a client may claim to have; the number is its weight in the average."""


@dataclass
class TrainingConfig:
    optimizer: Optimizer = Optimizer.adamw
    """Optimizer of each client's local training; its state is reset every round."""
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
    """Learning rate schedule over all local steps of all rounds."""
    warmup_ratio: float = 0.02
    """Fraction of all steps in which the learning rate rises linearly to its peak."""
    batch_size: int = 4
    """Examples per client and micro-batch."""
    accumulation: int = 1
    """Micro-batches per local step."""
    local_steps: int = 10
    """Local optimizer steps of a client per round."""
    local_epochs: Optional[int] = None
    """Passes over a client's examples per round; replaces local_steps when set."""
    group_by_length: bool = True
    """Batch examples of similar length together."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    tokens_per_pass: Union[int, str] = AUTO
    """Maximum number of tokens in one forward and backward pass, padding included; a cohort's step is split into passes of this size. auto
    chooses for the device."""
    proximal_mu: float = 0.0
    """FedProx: weight mu of the pull mu/2 |x - x_start|^2 towards the start of the round."""
    scaffold: bool = False
    """SCAFFOLD: control variates against client drift, sent both ways with the factors. Needs training.optimizer=sgd without momentum
    and without proximal_mu."""


@dataclass
class ServerConfig:
    rule: ServerRule = ServerRule.mean
    """How the clients' uploads are combined."""
    trimmed: float = 0.1
    """trimmed_mean: fraction of the clients left out at each end."""
    malicious: int = 0
    """krum: largest number of clients that may be malicious."""
    kept: int = 0
    """krum: number of uploads that are averaged; 0 averages all but the malicious."""
    optimizer: str = "fedavg"
    """How the server applies the averaged update: fedavg, fedavgm, fedadam, fedyogi or fedadagrad."""
    learning_rate: float = 1.0
    """Server learning rate."""
    momentum: float = 0.9
    """Momentum of fedavgm; decay of the first moment of fedadam and fedyogi."""
    beta2: float = 0.99
    """Decay of the second moment of fedadam and fedyogi."""
    tau: float = 1e-3
    """Adaptivity: term added to the denominator of fedadam, fedyogi and fedadagrad."""
    max_update_norm: Optional[float] = 1e6
    """Largest accepted L2 norm of a client's update and of a change of its control variate; null accepts every finite one. With
    privacy.unit=client, clip_norm takes its place, and larger updates are scaled to it silently."""
    over_norm: OverNorm = OverNorm.refuse
    """What happens to an update larger than max_update_norm."""


@dataclass
class CompressionConfig:
    name: str = "none"
    """How an upload is compressed: none, bfloat16, int8, int4 or top_k."""
    density: float = 0.01
    """top_k: fraction of the entries to send."""
    error_feedback: bool = False
    """A client adds the compression error to its next upload."""


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
    """Delta of every client; null takes 1 / n^1.1, n being the number of its examples, or of clients. 1 / n or more is refused."""
    accountant: Accountant = Accountant.prv
    """How epsilon is computed; always skellam if the clients add the noise under secure aggregation."""
    init_share: float = 0.2
    """adapter.init=gradient_dp: fraction of epsilon that the initialisation may spend."""
    init_noise_multiplier: Optional[float] = None
    """adapter.init=gradient_dp: its noise multiplier; null calibrates it to init_share x epsilon."""
    adaptive_clip: bool = False
    """unit=client: let clip_norm follow a quantile of the updates' norms; the noised counts are accounted for."""
    clip_quantile: float = 0.5
    """unit=client, adaptive_clip: the quantile."""
    clip_rate: float = 0.2
    """unit=client, adaptive_clip: learning rate of the clip norm's logarithm."""
    noise: NoiseSource = NoiseSource.seed
    """Source of the noise, and of the random sampling of examples or, with unit=client, of clients. A deployment always takes system; of
    the simulations, only engine=inprocess can."""
    unsafe_init: bool = False
    """Allow adapter.init=gradient with privacy although it leaks: for audits only; the run then claims no epsilon."""
    secure_aggregation: bool = False
    """The server sees only sums of uploads (SecAgg+, see secure); linear methods only. With unit=client the clients add the noise."""


@dataclass
class SecureConfig:
    bits: int = 16
    """Secure aggregation: bits per value of an upload; the message adds the carry bits of the sum, rounded up to whole bytes."""
    range: float = 1.0
    """Largest change of an entry in a round that an upload can hold; larger ones are clipped and counted. unit=client: clip_norm."""
    gradient_range: float = 16.0
    """The same for an entry of a client's initial gradient or its sketch, in 32 bits; with gradient_dp at least 8 times its noise."""
    threshold: float = 0.6
    """Fraction of a round's clients that must stay to the end, or the round is abandoned. unit=client: they give all the noise."""
    neighbours: int = 0
    """Number of clients with which each client shares masks and secrets (an odd number is made even); 0 takes all others."""


@dataclass
class AuditConfig:
    canaries: int = 0
    """Examples of random tokens, dealt to the clients in turn, each included by a seeded coin flip; 0: none, 128 in fedsim audit."""
    confidence: float = 0.95
    """Confidence level of the lower bound on epsilon."""


@dataclass
class EvaluationConfig:
    every: int = 0
    """Evaluate after every k-th round as well; 0 evaluates before the first and after the last only."""
    max_new_tokens: int = 96
    """Longest generated answer in tokens; one that is cut off counts only if it has stated its result ("####", a box)."""
    tokens_per_pass: Union[int, str] = AUTO
    """Maximum number of tokens (prompt, answer and padding) in one generation batch; auto: 16384 on a CPU, on a GPU what its memory holds,
    halved if it runs out."""
    diagnosis: bool = True
    """Measure after every round how exact the average is, how far clients drift apart, and the effective rank of the update."""


@dataclass
class EngineConfig:
    name: str = "inprocess"
    """Flower Grid that carries the messages."""
    superlink: Optional[str] = None
    """deployment: name of the SuperLink in Flower's configuration (flwr config list)."""
    wait_seconds: float = 120.0
    """deployment: seconds to wait at the start of a run for clients that are not connected; afterwards rounds run without them."""
    actors: Optional[int] = None
    """ray: number of worker processes, each with its own GPU or core and base model; null takes one per GPU, else one per core."""
    address: Optional[str] = None
    """ray: address of a running Ray cluster (auto finds one on this machine); null starts Ray here, for this run."""
    cohort_size: int = 0
    """Number of clients that a worker trains together per message; 0 splits the round's clients equally over the workers."""


@dataclass
class Config:
    """A whole experiment: everything that can change a result."""

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
    """Seed of all randomness: data, partition, client sampling, batches, bases."""
    run_dir: Optional[str] = None
    """Run folder; null makes runs/<date>/<time>-<method>."""
    resume: bool = False
    """Continue from the last checkpoint of run_dir."""
    overwrite: bool = False
    """Replace a finished or interrupted run in run_dir."""

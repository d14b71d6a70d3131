"""The configuration: plain typed dataclasses; the line under a field is its help.

Hydra composes conf/ against these types (`fedsim.cli.compose`), and nothing beyond the entry sees a DictConfig.
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
    pairs: PairReading = PairReading.together
    """How an encoder reads the texts of a row that is classified; apart, a single one is the mean of its token states, too."""


@dataclass
class AdapterConfig:
    rank: Optional[int] = None
    """Rank r: the trained matrix R of each adapted layer is r x r; null takes 64, or the smallest side of the layers if that is less."""
    init: Optional[Init] = None
    """Where the factors start, and with them the common bases B and A; null takes the method's own: gradient for
    Fed-SB, weight_svd with privacy."""
    refresh_every: int = 0
    """Fed-SB: after every k-th round add B R A to the base weights and compute new bases; 0 keeps the first ones."""
    init_samples: int = 100
    """Examples in all from which the initial gradient is estimated; clients give equal shares, one with fewer examples than its share all
    that it has. gradient_dp: as many are expected, each example being drawn by its own coin."""
    sketch: bool = False
    """Take sketches of the initial gradients in place of whole matrices, a few times rank numbers for each row and column of a layer
    (where that is half at most): of a 7B model at rank 200 a seventh of the bytes and memory, for bases that train nearly as well."""
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
    """Local file or folder, or hub name; null takes each set's own hub name, which instructions and classification have not."""
    labels: list[str] = field(default_factory=list)
    """classification: the labels, in the order of the model's outputs; empty takes those of the training rows, sorted. A deployment, where
    nobody sees all rows, needs them."""
    train_examples: Optional[int] = None
    """Keep at most this many training examples in all; null keeps all."""
    test_examples: Optional[int] = None
    """Keep at most this many test examples of each task; null keeps all."""
    max_length: int = 512
    """Longest sequence in tokens; a longer training example is cut at its end, a conversation first at its beginning."""
    train_on: TrainOn = TrainOn.response
    """Which tokens carry the loss."""
    client_column: Optional[str] = None
    """Column of the training rows that names their owner, for federation.partition=natural; null where none does."""
    task_column: Optional[str] = None
    """Column of the rows that names their task, which is a row of the results and what partitions skew; null takes the set's name."""
    on_error: OnError = OnError.stop
    """What a malformed row does."""
    token_cache: bool = True
    """Keep the tokens of large training data in ~/.cache/fedsim/tokens, for later runs; the folder may be deleted at any time."""
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
    """What the Dirichlet mixture is over; null takes label where the data is classified and data.task_column names no tasks, else task."""
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
    """Seconds for which the clients that were asked are waited for: in each asking again anew (retries), and in each stage of secure
    aggregation. The round goes on without those that have not replied. null waits for all that are alive."""
    min_replies: float = 0.5
    """Replies a round needs: a fraction of the selected clients if below 1, else a count. Simulated drop-outs do not count."""
    over_selection: float = 0.0
    """Select this fraction more clients than a round wants; it goes on when as many as it wants have replied."""
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
    """Most tokens, with padding to the longest row, in one forward and backward pass, to which a cohort's step is cut; auto chooses for
    the device."""
    proximal_mu: float = 0.0
    """FedProx: weight mu of the pull mu/2 |x - x_start|^2 towards the start of the round."""
    scaffold: bool = False
    """SCAFFOLD: control variates against drift; they travel both ways with the factors. Needs training.optimizer=sgd without momentum
    and without proximal_mu."""


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
    """Largest L2 norm of a client's update, and of a change of its control variate, that is believed; null believes all that are finite."""
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
    noise: NoiseSource = NoiseSource.seed
    """What noise is drawn from, and the coins of examples or, with unit=client, of clients. A deployment always takes system; of
    simulations only engine=inprocess does."""
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
    """The same for an entry of a client's initial gradient or its sketch, in 32 bits; with gradient_dp at least 8 times its noise."""
    threshold: float = 0.6
    """Part of the round's clients that must stay to the end; with fewer the round is given up. unit=client: sized to give all the noise."""
    neighbours: int = 0
    """Clients with which each shares masks and secrets (an odd number is made even); 0 takes all others."""


@dataclass
class AuditConfig:
    canaries: int = 0
    """Examples of random tokens, dealt to the clients in turn, each put in by a coin from the seed; 0: none, 128 in fedsim audit."""
    confidence: float = 0.95
    """Probability with which the lower bound on epsilon holds."""


@dataclass
class EvaluationConfig:
    every: int = 0
    """Evaluate after every k-th round as well; 0 evaluates before the first and after the last only."""
    max_new_tokens: int = 96
    """Longest generated answer in tokens; one without its end is right only if it has named its result ("####", a box)."""
    tokens_per_pass: Union[int, str] = AUTO
    """Most tokens (prompt, answer and padding) in one generation batch; auto: 16384 on a CPU, on a GPU what its memory holds, halved
    where that runs out."""
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
    """Clients that a worker trains together in one message; 0 deals the round's clients to the workers in equal parts."""


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

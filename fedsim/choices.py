"""Enums of the words that options accept; each value explains its word.

Options take the name of a member: `training.optimizer=sgd`.
"""

from enum import Enum

AUTO = "auto"
"""Value of an option that is resolved once data, model and device are known."""


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


FROM_GRADIENTS = (Init.gradient, Init.gradient_public, Init.gradient_dp)
"""Initialisations from gradients of the base weights."""


class PairReading(Enum):
    together = "both in one sequence"
    apart = "each on its own, compared by the means of its token states, as encoders of sentences are trained"


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
    seed = "the run's seed: runs are repeatable, but anyone who knows the seed can remove the noise"
    system = "a secret key of the operating system: runs are not repeatable, and nobody can remove the noise"


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
    natural = "each client holds all examples of one owner (data.client_column), or of several if there are fewer clients"


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
    sgd = "SGD, with training.momentum"


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

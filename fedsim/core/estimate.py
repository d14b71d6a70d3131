"""Predicts the time and memory of a run from shapes and a few measured rates, without weights or a clock.

FLOPs are those of the matrix products, two per multiply-add. The base is frozen, so a token costs a forward pass and the gradient of the
activations, 4 x parameters, and no gradient of the weights. Bytes of transfers come from `fedsim.core.cost`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from torch import empty

from fedsim.choices import Init, Optimizer, PrivacyUnit
from fedsim.config import Config
from fedsim.core.cost import Forecast
from fedsim.core.decomposition import svd_flops
from fedsim.core.forms import DENSE, HEAD, AdapterSpec
from fedsim.core.gradient_parts import parts_of
from fedsim.core.initialization import DERIVED
from fedsim.core.memory import FACTOR_BYTES, ModelShape, pass_bytes
from fedsim.core.methods import Method
from fedsim.core.participation import round_size, steps_per_round
from fedsim.core.traffic import refresh_due

PADDED = 1.08
"""Positions of a pass per token, if the rows are unknown: rows are padded to the longest, and to few widths."""

GRADIENT_COPIES = 9
"""Copies of initial gradients, in float32 sizes, in a process that is server and worker and frees no memory: summed, flat and in a message,
of a client and of the one before; the sum over clients in float64, and in float32."""


@dataclass(frozen=True)
class Work:
    """The run's work in examples and tokens; means over examples. In classification no token carries a loss or is generated."""

    tokens: float  # of a training example, cut to data.max_length
    responses: float  # of these, tokens that carry a loss
    train_examples: int
    questions: int  # of all test sets
    prompt: float  # tokens of a test question
    answer: float  # tokens of a generated answer after training
    sequences: int = 1  # per example: two if its texts are encoded separately
    padded: float = PADDED  # positions of a training pass per token

    @property
    def length(self) -> float:
        """Tokens of a sequence in training."""
        return self.tokens / self.sequences


@dataclass(frozen=True)
class Calibration:
    """Rates of one machine for one model, and where they come from."""

    flops: float  # per second in training, matrix products
    pass_seconds: float  # of a training pass besides its FLOPs
    client_step_seconds: float  # of a client's step besides its passes
    decode_flops: float  # per second in generation; 0 if nothing is generated
    decode_seconds: float  # of a generation step besides its FLOPs
    copy_bytes: float  # of a message's arrays per second, through packing, checks and averaging
    client_seconds: float  # of a client's messages in a round besides their bytes
    svd_flops: float  # per second, float64
    process_bytes: int  # resident memory of a process before a model is loaded
    source: str


@dataclass(frozen=True)
class Phase:
    """One part of the run."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Estimate:
    """The whole run: its phases, the peak memory by use, and the bytes sent."""

    phases: tuple[Phase, ...]
    memory: dict[str, float]
    num_bytes: dict[str, int]
    flops: float  # of training

    @property
    def seconds(self) -> float:
        """Time of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak_bytes(self) -> float:
        """Memory at the peak."""
        return sum(self.memory.values())


def trained_parameters(spec: AdapterSpec, kinds: Sequence[str]) -> int:
    """Returns the trained parameters that every token goes through: all but a classification head, applied once per row."""
    return spec.num_parameters([kind for kind in kinds if kind != HEAD])


def chain_parameters(spec: AdapterSpec) -> int:
    """Returns the multiply-adds per token in all adapters: the number of elements of the matrices in the form's chains."""
    total = 0
    for layer in spec.layers:
        factors = {kind: empty(shape, device="meta") for kind, shape in spec.shapes(layer).items()}
        total += sum(matrix.numel() for matrix in spec.form.chain(factors))
    return total


def forward_flops(shape: ModelShape, tokens: float, length: float, targets: float, adapters: int = 0) -> float:
    """Returns the FLOPs of a forward pass of `tokens` tokens in sequences of `length`, of which `targets` need logits."""
    attention = 2.0 * shape.attention_width * length * shape.layers  # scores and their product with the values, ignoring the mask
    return 2.0 * (tokens * (shape.block_parameters + adapters + attention) + targets * shape.head_parameters)


def training_flops(
    shape: ModelShape, tokens: float, length: float, targets: float, adapters: int, trained: int, *, checkpointing: bool = False
) -> float:
    """Returns the FLOPs of forward and backward: the gradients of all activations and trained parameters.

    The gradient of the first layers' input is counted although it is not needed.
    """
    forward = forward_flops(shape, tokens, length, targets, adapters)
    attention = 2.0 * (2.0 * shape.attention_width * length * shape.layers) * tokens  # the backward of attention is twice its forward
    again = forward_flops(shape, tokens, length, 0, adapters) if checkpointing else 0.0
    return 2.0 * forward + attention + again + 2.0 * tokens * trained


def estimate(
    config: Config, method: Method, spec: AdapterSpec, shape: ModelShape, work: Work, rates: Calibration, cost: Forecast
) -> Estimate:
    """Returns the estimate of the run of `config`, in which the method's defaults and the sizes of passes must be resolved."""
    plan = _Plan(config, method, spec, shape, work, rates, cost)
    phases = (plan.initialization(), plan.training(), plan.transfers(), plan.evaluation())
    return Estimate(phases, plan.memory(), dict(cost.totals), plan.flops_of_training)


class _Plan:
    """The counts that the phases share."""

    def __init__(
        self, config: Config, method: Method, spec: AdapterSpec, shape: ModelShape, work: Work, rates: Calibration, cost: Forecast
    ) -> None:
        self._config, self._method, self._spec, self._shape = config, method, spec, shape
        self._work, self._rates, self._cost = work, rates, cost
        training, federation = config.training, config.federation
        self._participants = round_size(federation.clients, federation.fraction)
        self._cohort = min(config.engine.cohort_size or self._participants, self._participants)
        batch = training.batch_size * training.accumulation
        average = max(1, ceil(work.train_examples / federation.clients))
        self._batch = min(batch, average)
        self._steps = steps_per_round(average, training)
        self._client_steps = federation.rounds * self._participants * self._steps
        self._trained = spec.num_parameters(method.trained(1))
        self._adapters = chain_parameters(spec)

    # ---- time

    @property
    def _step_tokens(self) -> float:
        return self._cohort * self._batch * self._work.tokens

    @property
    def _pass_positions(self) -> float:
        """Positions of one pass: the budget, or a whole step if that is less."""
        return min(self._token_budget, self._work.padded * max(self._step_tokens, self._work.tokens))

    @property
    def _token_budget(self) -> float:
        """The budget of a pass, at least one example."""
        return max(int(self._config.training.tokens_per_pass), self._work.tokens)

    @property
    def flops_of_training(self) -> float:
        """FLOPs of local training over all rounds."""
        tokens = self._client_steps * self._batch * self._work.tokens
        targets = self._client_steps * self._batch * self._work.responses
        checkpointing = self._config.training.activation_checkpointing
        trained = trained_parameters(self._spec, self._method.trained(1))
        return training_flops(self._shape, tokens, self._work.length, targets, self._adapters, trained, checkpointing=checkpointing)

    def training(self) -> Phase:
        """Returns the phase of the passes and each client's optimizer steps."""
        rates, padded = self._rates, self._work.padded
        passes = self._client_steps / self._cohort * ceil(padded * self._step_tokens / self._token_budget)
        seconds = padded * self.flops_of_training / rates.flops + passes * rates.pass_seconds
        seconds += self._client_steps * rates.client_step_seconds
        tokens = self._client_steps * self._batch * self._work.tokens
        return Phase("training", seconds, f"{tokens:,.0f} tokens, {passes:,.0f} passes, {self.flops_of_training:.3g} FLOPs")

    def initialization(self) -> Phase:
        """Returns the phase of the initial gradients, one per sample at the base weights, and the SVDs; bases from the seed are free."""
        init, again = self._config.adapter.init, sum(refresh_due(self._config, n) for n in range(1, self._config.federation.rounds + 1))
        if init in DERIVED and init is not Init.weight_svd:
            return Phase("initialisation", 0.0, "bases from the seed")
        svd = self._svd_flops() / self._rates.svd_flops
        if init is Init.weight_svd:
            return Phase("initialisation", (1 + again) * svd, "decomposition of the base weights")
        samples, clients_with_gradient = self._samples, self._clients_with_gradient
        tokens = samples * self._work.tokens
        flops = training_flops(self._shape, tokens, self._work.length, samples * self._work.responses, 0, self._shape.block_parameters)
        moved = 2.0 * 4 * self._gradient_size * clients_with_gradient / self._rates.copy_bytes
        seconds = flops / self._rates.flops + clients_with_gradient * self._rates.pass_seconds + svd + moved
        return Phase(
            "initialisation",
            (1 + again) * seconds,
            f"gradients of {samples:,} examples of {clients_with_gradient:,} clients, {len(self._spec.layers)} SVDs",
        )

    @property
    def _samples(self) -> int:
        """Examples of all initial gradients."""
        return min(self._config.adapter.init_samples, self._work.train_examples)

    @property
    def _clients_with_gradient(self) -> int:
        return max(1, self._cost.clients_with_gradient)

    @property
    def _dense_size(self) -> int:
        return sum(prod(sides) for sides in self._spec.layers.values())

    @property
    def _gradient_size(self) -> int:
        return parts_of(self._config, self._spec).layout.num_parameters

    def _svd_flops(self) -> float:
        return sum(svd_flops(m, n, self._spec.rank) for m, n in self._spec.layers.values())

    def transfers(self) -> Phase:
        """Returns the phase of packing, checking, counting and averaging in one process, without a network."""
        moved = sum(number for name, number in self._cost.totals.items() if name.endswith("payload_bytes") and not name.startswith("setup"))
        count = self._config.federation.rounds * self._participants
        seconds = moved / self._rates.copy_bytes + count * self._rates.client_seconds
        return Phase(
            "transfers", 0.0 if self._method.pooled else seconds, f"{count:,} client rounds, {moved / 1e6:,.1f} MB of arrays besides set-up"
        )

    def evaluation(self) -> Phase:
        """Returns the phase of evaluation: forward passes in classification; else generating the base model's answers, assumed to run to
        the limit, and those after training, and the loss of the references."""
        options, work = self._config.evaluation, self._work
        rounds = self._config.federation.rounds
        later = 1 + (len([n for n in range(1, rounds) if n % options.every == 0]) if options.every else 0)
        if self._spec.head:
            return Phase("evaluation", (1 + later) * self._classification(), f"{work.questions:,} rows {1 + later} times")
        answers = (float(options.max_new_tokens), *(min(work.answer, options.max_new_tokens) for _ in range(later)))
        seconds = sum(self._generation(answer) for answer in answers)
        tokens = work.questions * sum(answers)
        return Phase("evaluation", seconds, f"{work.questions:,} questions {1 + later} times, {tokens:,.0f} generated tokens")

    @property
    def _questions_at_once(self) -> int:
        """Rows of an evaluation batch."""
        most = int(self._config.evaluation.tokens_per_pass) // (self._work.prompt + self._longest_answer)
        return int(max(1, min(self._work.questions, most)))

    @property
    def _longest_answer(self) -> int:
        return 0 if self._spec.head else self._config.evaluation.max_new_tokens

    def _classification(self) -> float:
        work, rates = self._work, self._rates
        flops = forward_flops(self._shape, work.questions * work.prompt, work.prompt / work.sequences, 0)
        return work.padded * flops / rates.flops + ceil(work.questions / self._questions_at_once) * rates.pass_seconds

    def _generation(self, answer: float) -> float:
        options, work, shape, rates = self._config.evaluation, self._work, self._shape, self._rates
        batches = ceil(work.questions / self._questions_at_once)
        length = work.prompt + answer / 2
        flops = forward_flops(shape, work.questions * work.prompt, work.prompt, work.questions) / rates.flops
        flops += forward_flops(shape, work.questions * answer, length, work.questions * answer) / rates.decode_flops
        loss = forward_flops(shape, work.questions * (work.prompt + work.answer), work.prompt + work.answer, work.questions * work.answer)
        return flops + batches * min(2 * answer, options.max_new_tokens) * rates.decode_seconds + loss / rates.flops

    # ---- memory

    def memory(self) -> dict[str, float]:
        """Returns the bytes at the peak by use, for one process that is server and worker."""
        shape, config = self._shape, self._config
        number = shape.weight_bytes
        moments = {Optimizer.adamw: 2, Optimizer.sgd: 1 if config.training.momentum else 0}[config.training.optimizer]
        moments = moments if config.training.local_epochs or config.training.local_steps > 1 else 0  # a single step keeps none
        private = 1 if config.privacy.unit is PrivacyUnit.example else 0
        positions, padded = self._pass_positions, self._work.padded
        held = pass_bytes(
            shape,
            self._spec,
            self._method.trained(1),
            positions,
            length=padded * self._work.length,
            groups=max(1.0, positions / (padded * self._work.tokens) / (1 if private else config.training.batch_size)),
            targets=self._targets(positions),
            checkpointing=config.training.activation_checkpointing,
        )
        whole = self._spec.num_parameters(self._spec.kinds)
        merged = number * self._dense_size if number >= 4 else 0  # answers use merged weights if those are in float32
        evaluation = self._questions_at_once * self._question_bytes + merged
        folds = self._method.folds or config.adapter.refresh_every > 0
        return {
            "process": float(self._rates.process_bytes),
            "base model": float(number * shape.parameters),
            "common factors": 2.0 * 4 * whole,
            "what is folded into the base model": float((number + 4) * self._dense_size if folds else 0),
            "clients' factors, gradients, moments and uploads": 4.0 * self._trained * self._cohort * (4 + moments + private),
            "largest of a training pass, initial gradients and evaluation": max(held, self._initial_bytes, evaluation),
        }

    @property
    def _initial_bytes(self) -> float:
        """Bytes of the initial gradients: a pass that keeps every layer's input, and the copies of the sums."""
        if self._config.adapter.init in DERIVED:
            return 0.0
        work, dense = self._work, replace(self._spec, form=DENSE)
        positions = min(self._token_budget, work.padded * work.tokens * self._samples / self._clients_with_gradient)
        targets = self._targets(positions)
        held = pass_bytes(self._shape, dense, ("D",), positions, length=work.padded * work.length, groups=0, targets=targets)
        return held + GRADIENT_COPIES * FACTOR_BYTES * self._gradient_size

    def _targets(self, positions: float) -> float:
        """Returns how many positions of a pass have logits; 0.2 is added because responses begin at different places."""
        return min(1.0, self._work.responses / self._work.tokens + 0.2) * positions

    @property
    def _question_bytes(self) -> float:
        """Bytes of a row of an evaluation batch: the cache of its answer, or in classification a block's activations."""
        tokens = self._work.prompt + self._longest_answer
        length, shape = tokens / self._work.sequences, self._shape
        return tokens * (shape.block_bytes(length) + shape.backward_bytes(length) if self._spec.head else shape.cache_bytes)

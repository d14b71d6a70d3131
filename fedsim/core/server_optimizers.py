"""Server optimizers: they take the round's change, mean of the clients - start, as a gradient step.

FedAvgM is from Hsu et al. 2019 (arXiv 1909.06335), FedAdagrad, FedYogi and FedAdam are from Reddi et al. 2020 (arXiv 2003.00295). All
follow Flower 1.41, which differs from the papers: second moments start at 0 and not at tau^2; FedAdagrad has no momentum; FedAdam
corrects the bias of both moments in its learning rate, which Reddi et al. do not do, with the round number plus one as the exponent
instead of Kingma and Ba's round number; FedAvgM has a learning rate, and is that of Hsu et al. if it is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What an optimizer keeps between rounds, by name: flat float32 [parameters], and the number of steps as a 0-d int64. Empty at first."""


@dataclass(frozen=True)
class ServerOptions:
    """Hyperparameters of a server optimizer. Raises ValueError for a value out of range."""

    learning_rate: float = 1.0
    """Step size; 1 takes the clients' mean as it is (fedavg), the adaptive optimizers want about 1e-2 to 1e-1."""

    momentum: float = 0.9
    """Fraction of the previous direction that is kept (beta1); fedavg and fedadagrad have none."""

    beta2: float = 0.99
    """Fraction of the previous second moment that fedadam and fedyogi keep."""

    tau: float = 1e-3
    """Added to the root of the second moment; the larger, the less the step adapts to each parameter."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"Expected a learning_rate above 0, got {self.learning_rate}.")
        if not (0 <= self.momentum < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"Expected 0 <= momentum < 1 and 0 <= beta2 < 1, got {self.momentum} and {self.beta2}.")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"Expected tau above 0, got {self.tau}.")


@dataclass(frozen=True)
class ServerOptimizer:
    """One rule that turns the start of a round and the clients' mean into the next start."""

    name: str
    state_names: frozenset[str]  # what the state holds after the first step
    _step: Callable[[Tensor, Tensor, State, ServerOptions], tuple[Tensor, State]]

    def step(self, start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
        """Returns the next global factors, float32 [parameters], and the next state. The first state is empty.

        Guarantees: no argument is changed; the result depends on the arguments alone, so a run resumes from a saved state bit for bit.
        Raises ValueError unless start and mean are float32 of one shape, and for a state of another optimizer or another size.
        """
        if (start.dtype, start.shape) != (torch.float32, mean.shape) or mean.dtype != torch.float32:
            raise ValueError(f"Expected two float32 tensors of one shape, got {start.dtype} {start.shape} and {mean.dtype} {mean.shape}.")
        if state and set(state) != self.state_names:
            raise ValueError(f"Expected the state of {self.name} to hold {sorted(self.state_names)}, got {sorted(state)}.")
        for name, tensor in state.items():
            if name != "step" and tensor.shape != mean.shape:
                raise ValueError(f"Expected {name!r} of shape {tuple(mean.shape)}, got {tuple(tensor.shape)}; is it from another adapter?")
        return self._step(start, mean, state, options)


def _fedavg(start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
    """Returns `mean` itself, bit for bit, if the learning rate is 1."""
    if options.learning_rate == 1:
        return mean, {}
    return start + options.learning_rate * (mean - start), {}


def _fedavgm(start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
    """Heavy ball without damping, as in torch.optim.SGD: a steady change is taken 1 / (1 - momentum) times."""
    change = mean - start
    direction = options.momentum * state["momentum"] + change if state else change
    return start + options.learning_rate * direction, {"momentum": direction}


def _fedadagrad(start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
    change = mean - start
    second = _or_zeros(state, "second_moment", mean) + change.square()
    return _adaptive(start, change, second, options.learning_rate, options.tau), {"second_moment": second}


def _fedyogi(start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
    """The second moment moves by a fraction of the square of the change, not of the distance to it, so it falls slowly."""
    change = mean - start
    first, second, square = _first_moment(change, state, options), _or_zeros(state, "second_moment", mean), change.square()
    second = second - (1 - options.beta2) * square * (second - square).sign()
    return _adaptive(start, first, second, options.learning_rate, options.tau), {"momentum": first, "second_moment": second}


def _fedadam(start: Tensor, mean: Tensor, state: State, options: ServerOptions) -> tuple[Tensor, State]:
    change = mean - start
    step = int(state["step"]) + 1 if state else 1
    first = _first_moment(change, state, options)
    second = options.beta2 * _or_zeros(state, "second_moment", mean) + (1 - options.beta2) * change.square()
    # Flower's exponent, one more than Kingma and Ba's.
    rate = options.learning_rate * sqrt(1 - options.beta2 ** (step + 1)) / (1 - options.momentum ** (step + 1))
    next_state = {"momentum": first, "second_moment": second, "step": torch.tensor(step)}
    return _adaptive(start, first, second, rate, options.tau), next_state


def _first_moment(change: Tensor, state: State, options: ServerOptions) -> Tensor:
    return options.momentum * _or_zeros(state, "momentum", change) + (1 - options.momentum) * change


def _or_zeros(state: State, name: str, like: Tensor) -> Tensor:
    return state[name] if state else torch.zeros_like(like)


def _adaptive(start: Tensor, first: Tensor, second: Tensor, rate: float, tau: float) -> Tensor:
    return start + rate * first / (second.sqrt() + tau)


FEDAVG = ServerOptimizer("fedavg", frozenset(), _fedavg)
FEDAVGM = ServerOptimizer("fedavgm", frozenset({"momentum"}), _fedavgm)
FEDADAGRAD = ServerOptimizer("fedadagrad", frozenset({"second_moment"}), _fedadagrad)
FEDYOGI = ServerOptimizer("fedyogi", frozenset({"momentum", "second_moment"}), _fedyogi)
FEDADAM = ServerOptimizer("fedadam", frozenset({"momentum", "second_moment", "step"}), _fedadam)

SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {rule.name: rule for rule in (FEDAVG, FEDAVGM, FEDADAGRAD, FEDYOGI, FEDADAM)}

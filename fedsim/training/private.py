"""DP-SGD for a cohort (arXiv 1607.00133): one Opacus optimizer clips, adds noise and steps for all clients, each as if it were alone.

Opacus's DPOptimizer keeps one clip-and-noise state per parameter. Here the parameter is the stack of the cohort, so three of its steps are
overridden: an example is clipped over all its factors and added to its own client's row; noise is drawn per client, from the
client's own generator and with its own standard deviation; and a row is divided by its own client's expected batch size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _generate_noise
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from fedsim.core.payload import Layout
from fedsim.seeding import NoiseKey
from fedsim.training.gradients import clip_factors, finite_rows
from fedsim.training.stack import Place, accumulate, on_device
from fedsim.types import Adapter

COIN_SIDES = 1 << 24
"""Values of `torch.rand` in float32, with which Opacus's sampler draws its coins."""
THREADED_FROM = 1 << 20
"""Parameters of a client from which a thread for its noise pays off; one normal number takes ten nanoseconds."""


@dataclass(frozen=True)
class PrivateRule:
    """How the clients of a cohort train privately; lists run in the order of the clients."""

    clip_norm: float
    noise_multipliers: tuple[float, ...]
    key: NoiseKey


def sampling_rate(num_examples: int, batch_size: int) -> float:
    """Returns the probability that an example is in a step: an expected batch of `batch_size`, or everything."""
    return coin_rate(batch_size / num_examples)


def coin_rate(rate: float) -> float:
    """Returns the smallest probability of at least `rate` that a coin can have: a multiple of 2^-24, at most 1."""
    return min(1.0, math.ceil(rate * COIN_SIDES) / COIN_SIDES)


def poisson_batches(num_examples: int, rate: float, steps: int, generator: torch.Generator) -> list[list[int]]:
    """Returns the example indices of each step: an independent coin draws every example, so a batch may be empty."""
    sampler = UniformWithReplacementSampler(num_samples=num_examples, sample_rate=rate, generator=generator, steps=steps)
    return [list(batch) for batch in sampler]


class _StackOptimizer(torch.optim.Optimizer):
    """Passes the noised gradients of the active clients to the trainer's own step."""

    def __init__(self, stack: nn.Parameter, step: Callable[[Tensor], None]) -> None:
        super().__init__([stack], {})
        self._step = step
        self.gradients = torch.zeros(0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._step(self.gradients)


class CohortDPOptimizer(DPOptimizer):
    """An Opacus optimizer over a stack [clients, parameters]; row i belongs to client i and gets only its noise.

    Guarantees: equal to one `DPOptimizer` per client with the same noise, to float tolerance; an example moves its client's sum
    by at most `clip_norm`, whatever it and the others are; every step adds noise, even after an empty batch.
    """

    def __init__(
        self,
        stack: Tensor,
        layout: Layout,  # of one row
        step: Callable[[Tensor], None],  # updates the stack from the gradients [active, parameters]
        *,
        noise_multipliers: Sequence[float],
        clip_norm: float,
        expected_batch_sizes: Sequence[float],
        generators: Sequence[torch.Generator],
    ) -> None:
        self._parameter = nn.Parameter(stack)
        self._stack_optimizer = _StackOptimizer(self._parameter, step)
        super().__init__(
            self._stack_optimizer,
            noise_multiplier=max(noise_multipliers),
            max_grad_norm=clip_norm,
            expected_batch_size=1,
        )
        self._noise_multipliers, self._generators, self._layout = noise_multipliers, generators, layout
        self._expected = torch.tensor(expected_batch_sizes, device=stack.device).unsqueeze(1)
        self._pool = ThreadPoolExecutor(torch.get_num_threads()) if stack.shape[1] >= THREADED_FROM else None
        self._noises: Iterator[Tensor] | None = None  # for this step, if already drawn
        self._sum = torch.zeros(0)
        self._where: Place = slice(0, 0)
        self._gradients: Adapter = {}

    def start(self, sums: Tensor) -> None:
        """Begins a step of the first `len(sums)` clients; `sums` [active, parameters] are zeros, which it overwrites.

        While a GPU computes the step, the CPU draws the noise of large adapters; a restarted step keeps the noise drawn for it.
        """
        self._sum = sums
        if self._pool and sums.device.type != "cpu" and self._noises is None:
            self._noises = self._pool.map(self._draw_noise, range(len(sums)))

    def add(self, where: Place, gradients: Adapter) -> None:
        """Clips the examples' gradients [groups, rows of a group, ...] and adds those of group g to the g-th row of `where`."""
        self._where, self._gradients = where, gradients
        self.clip_and_accumulate()
        self._gradients = {}

    def finish(self) -> None:
        """Adds noise, divides by the expected batch sizes and takes the optimizer's step."""
        self.add_noise()
        self.scale_grad()
        self.original_optimizer.step()

    def clip_and_accumulate(self) -> None:
        norms = torch.stack([torch.linalg.vector_norm(part.flatten(2), dim=2) for part in self._gradients.values()]).norm(dim=0)
        factors = clip_factors(norms, self.max_grad_norm).unsqueeze(1)  # [groups, 1, rows]
        parts = finite_rows(self._gradients.values(), norms)
        sums = {
            name: torch.bmm(factors, part.flatten(2)).view(len(part), *part.shape[2:])
            for name, part in zip(self._gradients, parts, strict=True)
        }
        accumulate(self._sum, self._layout, self._where, sums)

    def add_noise(self) -> None:
        noises = self._noises or (self._pool.map if self._pool else map)(self._draw_noise, range(len(self._sum)))
        self._noises = None
        for total, noise in zip(self._sum, noises, strict=True):
            total.add_(on_device(noise, total.device))  # in float64, rounded once

    def _draw_noise(self, slot: int) -> Tensor:
        """Returns the noise of a client's step from the client's own generator, so any thread may draw it."""
        return gaussian_noise(self._noise_multipliers[slot] * self.max_grad_norm, self._sum.shape[1:], self._generators[slot])

    def scale_grad(self) -> None:
        self._stack_optimizer.gradients = self._sum.div_(self._expected[: len(self._sum)])


def noise_of_initial_gradient(gradient: Tensor, noise_multiplier: float, clip_norm: float, generator: torch.Generator) -> Tensor:
    """Returns the flat sum of clipped gradients with Gaussian noise of standard deviation noise_multiplier x clip_norm in every entry.

    One example moves the sum by at most clip_norm in L2 norm over all layers, which is the sensitivity; the SVD that turns it into
    bases is post-processing.
    """
    if not math.isfinite(noise_multiplier) or noise_multiplier < 0:
        raise ValueError(f"Expected a finite noise multiplier of at least 0, got {noise_multiplier}.")
    return (gradient + gaussian_noise(noise_multiplier * clip_norm, gradient.shape, generator)).float()


def gaussian_noise(deviation: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Returns Opacus's Gaussian noise [shape] in float64 on the CPU, the same for every device: add it in float64, round to float32 once.

    float32 noise lies on a grid, and the last bits of a sum with it reveal the other summand, however large the noise is (Mironov,
    CCS 2012, doi 10.1145/2382196.2382264). Rounding hides the grid of float64, which is 29 bits finer.
    """
    noise: Tensor = _generate_noise(std=deviation, reference=torch.empty(shape, dtype=torch.float64), generator=generator)
    return noise

"""Computes a round's mean, and the sum of the initial gradients, from secure sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor

from fedsim.choices import PrivacyUnit, Weighting
from fedsim.core.communication import Purpose
from fedsim.core.global_state import GlobalState
from fedsim.core.quantization import LOSS_UNITS, gradient_quantizer, num_counters, upload_quantizer
from fedsim.flower.requests import SETUP
from fedsim.flower.secure import Protocol, Summed, Wanted, Work
from fedsim.flower.worker import INITIAL_GRADIENT, TRAIN
from fedsim.session import Session

ROOM_FOR_NOISE = 8
"""Standard deviations of the noise of private initial gradients that fit within their grid."""


@dataclass(frozen=True)
class SecureRound:
    """What the server learns from a round; lists are over the survivors, in the order of arrival."""

    mean: Tensor  # [parameters] weighted mean of the survivors' factors
    clients: list[int]
    num_examples: list[int]
    weights: list[float]
    mean_loss: float  # nan if withheld
    num_tokens: int


def secure_round(session: Session, state: GlobalState, protocol: Protocol, work: Work) -> SecureRound:
    """Returns the survivors' mean. Raises SumRefused.

    Guarantees: each entry differs from the mean of the clipped changes by less than clients * step * largest weight / sum of weights.
    """
    config, kinds = session.config, session.method.uploaded(protocol.server_round)
    start = state.flat(kinds).double()
    quantizer = upload_quantizer(config, len(protocol.clients))
    wanted = Wanted(TRAIN, Purpose.adapter, quantizer, len(start), num_counters(config), work)
    summed = protocol.carry_out(wanted)
    counts = [summed.num_examples[client] for client in summed.survivors]
    by_examples = config.federation.weighting is Weighting.examples
    weights = [float(count) if by_examples else 1.0 for count in counts]
    largest = max(summed.num_examples.values()) if by_examples else 1
    mean = start + torch.from_numpy(summed.values[: len(start)] * (quantizer.step * largest / sum(weights)))
    clipped, tokens, loss = _counted(wanted, summed) or (0, 0, 0)
    protocol.count(clipped=clipped)
    mean_loss = nan if config.privacy.unit is not PrivacyUnit.none else loss / LOSS_UNITS / sum(counts)
    return SecureRound(mean.float(), summed.survivors, counts, weights, mean_loss, tokens)


def secure_gradients(session: Session, protocol: Protocol, work: Work, noise: float) -> Tensor:
    """Returns the flat sum of the clients' initial gradients, [parameters] in float64. Raises SumRefused.

    `noise` is the largest standard deviation of their noise.
    """
    reach = max(session.config.secure.gradient_range, ROOM_FOR_NOISE * noise)
    protocol.told = {SETUP: True, "gradient_range": reach}
    quantizer, size = gradient_quantizer(reach, len(protocol.clients)), session.gradient_parts.layout.num_parameters
    wanted = Wanted(INITIAL_GRADIENT, Purpose.initial_gradient, quantizer, size, 1, work)
    summed = protocol.carry_out(wanted)
    protocol.count(clipped=_counted(wanted, summed)[0])
    return torch.from_numpy(summed.values[:size] * quantizer.step)


def _counted(wanted: Wanted, summed: Summed) -> Sequence[int]:
    if not wanted.counters:
        return []
    return [wanted.quantizer.counted(digits) for digits in np.split(summed.values[wanted.parameters :], wanted.counters)]

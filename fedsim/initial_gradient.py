"""Gradients of the base weights for computing the bases B and A, on a sample of a client's data or on a public shard."""

from collections.abc import Sequence

from torch import Tensor

from fedsim.choices import Init
from fedsim.core.initialization import from_gradients, from_noised_gradients
from fedsim.seeding import numpy_generator
from fedsim.session import Session
from fedsim.training.gradients import clipped_weight_gradients, weight_gradients
from fedsim.training.optimizers import learning_rate
from fedsim.training.private import noise_of_initial_gradient, poisson_batches
from fedsim.types import Adapter, AnyEncoded


def summed_gradients(session: Session, examples: Sequence[AnyEncoded]) -> Adapter:
    """Returns the loss gradient of every adapted base weight, summed over the examples without updates, in the session's parts."""
    pad_id, parts = session.tokenizer.pad_token_id, session.gradient_parts
    return session.gradient_budget.within_memory(
        lambda tokens: weight_gradients(session.model, examples, pad_id=pad_id, tokens_per_pass=tokens, parts=parts)
    )


def client_gradient(
    session: Session, client: int, num_samples: int, noise: float | None = None, round: int = 0, rate: float = 0.0
) -> Tensor:
    """Returns the weight gradients of a seeded sample of the client's own examples, in the session's parts as one flat array.

    With `noise` it is private: each example is drawn independently with probability `rate` (`num_samples` is ignored), its gradient is
    clipped, and the sum is noised.
    """
    examples = session.client_data(client).examples
    if noise is not None:
        return _private_gradient(session, client, noise, round, rate)
    chosen = numpy_generator(session.config.seed, "init", client).choice(len(examples), min(num_samples, len(examples)), replace=False)
    return session.gradient_parts.layout.pack_on_cpu(summed_gradients(session, [examples[i] for i in chosen]))


def _private_gradient(session: Session, client: int, noise: float, round: int, rate: float) -> Tensor:
    examples, clip_norm = session.client_data(client).examples, session.config.privacy.clip_norm
    (chosen,) = poisson_batches(len(examples), rate, 1, session.noise_key.torch("init poisson", round, client))
    mine, pad_id, parts = [examples[i] for i in chosen], session.tokenizer.pad_token_id, session.gradient_parts
    gradients = session.gradient_budget.within_memory(
        lambda tokens: clipped_weight_gradients(
            session.model, mine, clip_norm, pad_id=pad_id, tokens_per_pass=max(1, tokens // 2), parts=parts
        )
    )
    generator = session.noise_key.torch("init noise", round, client)
    return noise_of_initial_gradient(parts.layout.pack_on_cpu(gradients), noise, clip_norm, generator)


def factors_from_gradients(session: Session, gradients: Adapter, steps_taken: int = 0) -> Adapter:
    """Returns B, R, A of the next full fine-tuning step along the summed gradients, in the session's parts; R is 0 with gradient_dp."""

    def whole(layer: str) -> Tensor:
        return session.gradient_parts.whole(gradients, layer)

    if session.config.adapter.init is Init.gradient_dp:
        return from_noised_gradients(session.spec, whole, session.config.seed, session.device)
    eta = learning_rate(steps_taken, session.total_steps, session.config.training)
    return from_gradients(session.spec, whole, eta, session.config.seed, session.device)

"""The public shard of `adapter.init=gradient_public`: a sample of the training examples that the server holds and no client owns."""

from collections.abc import Sequence

from fedsim.choices import Init
from fedsim.config import Config
from fedsim.errors import UserError
from fedsim.seeding import numpy_generator
from fedsim.types import AnyExample


def split_public(config: Config, train: Sequence[AnyExample]) -> tuple[list[AnyExample], list[AnyExample]]:
    """Returns the examples that are dealt to the clients, and the public ones, both in their order; with another init all are dealt.

    Raises UserError where nothing would be left to deal.
    """
    if config.adapter.init is not Init.gradient_public:
        return list(train), []
    count = config.adapter.init_samples
    if count >= len(train):
        raise UserError(f"adapter.init_samples: expected fewer than the {len(train)} training examples, got {count}.")
    public = set(numpy_generator(config.seed, "public").permutation(len(train))[:count].tolist())
    return [example for i, example in enumerate(train) if i not in public], [train[i] for i in sorted(public)]

"""Selects clients and their number of steps from the round and the seed (or key), never from node ids or the order of arrival."""

from math import ceil

from fedsim.choices import Init, PrivacyUnit, ServerRule
from fedsim.config import Config, FederationConfig, TrainingConfig
from fedsim.seeding import NoiseKey, numpy_generator


def drawn(config: Config, server_round: int, key: NoiseKey | None = None) -> list[int]:
    """Returns the clients of a round, in ascending order. `key` gives the coins under `central_privacy`; default: the seed's."""
    clients, fraction = config.federation.clients, config.federation.fraction
    if central_privacy(config):
        return draw_by_coin(clients, fraction, key or NoiseKey.of_seed(config.seed), server_round)
    return draw_participants(clients, fraction, config.seed, server_round)


def central_privacy(config: Config) -> bool:
    """Whether the server adds the noise of client-level privacy, and a secret coin draws each client, which amplifies privacy.

    With secure aggregation the clients add the noise, and the server sees who takes part: nothing is amplified.
    """
    return config.privacy.unit is PrivacyUnit.client and not config.privacy.secure_aggregation


def spares(config: Config, server_round: int) -> list[int]:
    """Returns the extra clients of a round, in ascending order: `federation.over_selection` of its size, drawn from the others."""
    count = ceil_fraction(config.federation.over_selection, round_size(config.federation.clients, config.federation.fraction))
    if not count:
        return []
    others = sorted({*range(config.federation.clients)} - {*drawn(config, server_round)})
    order = numpy_generator(config.seed, "spares", server_round).permutation(len(others))
    return sorted(others[place] for place in order[:count])


def least_replies(config: Config, wanted: int) -> int:
    """Returns how many of a round's `wanted` clients must be in its result, by `federation.min_replies` and the server's rule."""
    given, server = config.federation.min_replies, config.server
    least = ceil_fraction(given, wanted) if given < 1 else int(given)
    return max(least, 2 * server.malicious + 3, server.kept + server.malicious) if server.rule is ServerRule.krum else least


def gradient_samples(config: Config) -> dict[int, int]:
    """Returns the number of samples of each client that gives initial gradients: 0 for `gradient_dp`, where each example has a coin."""
    clients = config.federation.clients
    if config.adapter.init is Init.gradient_dp:
        return dict.fromkeys(range(clients), 0)
    return share_samples(config.adapter.init_samples, clients, config.seed)


def ceil_fraction(fraction: float, whole: int) -> int:
    """Returns the smallest whole number that is at least fraction * whole; 0.56 of 25 is 14, although the product in floats is above it."""
    return ceil(fraction * whole - 1e-9)


def round_size(clients: int, fraction: float) -> int:
    """Returns the number of clients in a round, at least one."""
    return max(1, round(fraction * clients))


def buffer_size(federation: FederationConfig) -> int:
    """Returns how many updates fill the buffer of `federation.mode=fedbuff`: by default half of `concurrency`."""
    return federation.buffer or max(1, concurrency(federation) // 2)


def concurrency(federation: FederationConfig) -> int:
    """Returns how many clients train at once with `federation.mode=fedbuff`."""
    return federation.concurrency or round_size(federation.clients, federation.fraction)


def draw_participants(clients: int, fraction: float, seed: int, server_round: int) -> list[int]:
    """Returns the clients of a round, in ascending order: a set of fixed size, at least one."""
    count = round_size(clients, fraction)
    return sorted(numpy_generator(seed, "participants", server_round).choice(clients, count, replace=False).tolist())


def draw_by_coin(clients: int, fraction: float, key: NoiseKey, server_round: int) -> list[int]:
    """Returns the clients of a round, each drawn by its own coin, as amplification by subsampling requires; there may be none.

    Nothing is amplified against those who know the key: clients receive the seed, so a deployment has a secret key.
    """
    coins = key.numpy("participants", server_round).random(clients)
    return [client for client, coin in enumerate(coins) if coin < fraction]


def share_samples(samples: int, clients: int, seed: int) -> dict[int, int]:
    """Returns the number of samples of each client that gives any: equal shares, or if too few, one each for a seeded choice of clients."""
    order = numpy_generator(seed, "init_shares").permutation(clients).tolist()
    shares = {client: samples // clients + (place < samples % clients) for place, client in enumerate(order)}
    return {client: shares[client] for client in sorted(shares) if shares[client]}


def steps_per_round(num_examples: int, training: TrainingConfig) -> int:
    """Returns the optimizer steps of a client with `num_examples` in one round."""
    if training.local_epochs is None:
        return training.local_steps
    return training.local_epochs * ceil(num_examples / (training.batch_size * training.accumulation))

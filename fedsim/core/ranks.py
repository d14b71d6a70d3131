"""Deals ranks to clients by the configured shares."""

from fedsim.seeding import numpy_generator


def deal_ranks(clients: int, shares: dict[int, float], seed: int) -> list[int]:
    """Returns the rank of each client. The shares are met to one client (largest remainders), the order is drawn from the seed."""
    total = sum(shares.values())
    exact = {rank: clients * share / total for rank, share in sorted(shares.items())}
    counts = {rank: int(value) for rank, value in exact.items()}
    by_remainder = sorted(exact, key=lambda rank: counts[rank] - exact[rank])
    for rank in by_remainder[: clients - sum(counts.values())]:
        counts[rank] += 1
    dealt = [rank for rank, count in counts.items() for _ in range(count)]
    order = numpy_generator(seed, "ranks").permutation(clients)
    return [dealt[place] for place in order.tolist()]

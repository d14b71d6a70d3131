"""Comparisons on a machine that is never quite quiet: all competitors in turns, medians, and ratios of neighbours in time."""

import statistics
import time
from collections.abc import Callable, Mapping

Task = Callable[[], float]
"""Does some work and returns how much it was, in the unit of the comparison (tokens, clients, bytes)."""

Rates = dict[str, list[float]]
"""Units per second of every competitor, one figure a turn."""


def interleaved(tasks: Mapping[str, Task], *, turns: int, seconds: float = float("inf")) -> Rates:
    """Returns the rates of all tasks over up to `turns` turns, at least two where turns allow it, stopping after `seconds`.

    Every task is called once before, to warm up. Turns run alternately forwards and backwards, so that a drift of the machine's speed
    meets all alike.
    """
    for task in tasks.values():
        task()
    found: Rates = {name: [] for name in tasks}
    begun = time.perf_counter()
    for turn in range(turns):
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
        for name in list(tasks)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(rate(tasks[name]))
    return found


def rate(task: Task) -> float:
    """Returns units per second of one call."""
    begun = time.perf_counter()
    amount = task()
    return amount / (time.perf_counter() - begun)


def medians(rates: Rates) -> dict[str, float]:
    """Returns the median rate of each competitor."""
    return {name: statistics.median(found) for name, found in rates.items()}


def ratio(rates: Rates, one: str, other: str) -> float:
    """Returns the median over turns of how many times as fast `one` was as `other` in the same turn."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

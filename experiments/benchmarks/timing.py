"""Comparisons on a noisy machine: competitors take turns, and results are medians and ratios within a turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import inf, sqrt

Task = Callable[[], float]
"""Does some work and returns its amount in the unit of the comparison (tokens, clients, bytes)."""

Rates = dict[str, list[float]]
"""Units per second of every competitor, one figure per turn."""

SETTLED = 0.01
"""Margin of a ratio, relative to it, at which a comparison has enough turns."""


def interleaved(tasks: Mapping[str, Task], *, turns: int, seconds: float = inf) -> Rates:
    """Returns the rates of all tasks, each called once first to warm up, see `in_turns`."""
    for task in tasks.values():
        task()
    return in_turns({name: partial(rate, task) for name, task in tasks.items()}, turns=turns, seconds=seconds)


def in_turns(measures: Mapping[str, Callable[[], float]], *, turns: int, seconds: float = inf) -> Rates:
    """Returns the rates of the measures over up to `turns` turns.

    After two turns it stops as soon as `seconds` have passed or the ratio of the first two measures has settled. Turns alternate between
    forward and backward order, so that a drift in the machine's speed affects all alike.
    """
    found: Rates = {name: [] for name in measures}
    begun = time.perf_counter()
    for turn in range(turns):
        late = time.perf_counter() - begun > seconds
        if turn >= 2 and (late or (len(found) > 1 and _settled(found, *list(found)[:2]))):
            break
        for name in list(measures)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(measures[name]())
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
    """Returns the median over turns of the rate of `one` divided by that of `other` in the same turn."""
    return statistics.median(_ratios(rates, one, other))


def margin(rates: Rates, one: str, other: str) -> float | None:
    """Returns half the width of the 95 % interval of that median; None for fewer than five turns, too few to estimate it.

    It is 1.96 standard errors of a median, each 1.253 standard deviations over the root of the number of turns, with the deviation taken
    from the interquartile range, 1.349 deviations (McGill, Tukey and Larsen 1978, for numbers from a normal distribution).
    """
    ratios = _ratios(rates, one, other)
    if len(ratios) < 5:
        return None
    low, _, high = statistics.quantiles(ratios, n=4)
    return 1.96 * 1.253 / 1.349 * (high - low) / sqrt(len(ratios))


def _settled(rates: Rates, one: str, other: str) -> bool:
    found = margin(rates, one, other)
    return found is not None and found <= SETTLED * ratio(rates, one, other)


def _ratios(rates: Rates, one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(rates[one], rates[other], strict=True)]

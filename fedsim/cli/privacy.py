"""`fedsim privacy`: the epsilon that a run would spend and the noise that it needs, without a model or training.

The numbers equal those of the run (`fedsim.privacy.plan`), except that examples which the run skips, because data.max_length cuts off
their whole response, still count here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from fedsim.choices import PrivacyUnit
from fedsim.config import Config
from fedsim.core.participation import central_privacy
from fedsim.data import load
from fedsim.data.assignment import assign_examples
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.privacy.accounting import Mechanism, epsilon
from fedsim.privacy.plan import ClientPlan, plan
from fedsim.report import loose_delta_lines, table

COMPARED = ("prv", "rdp")
MOST_ROUNDS = 10
"""Most rows of the table of epsilon over rounds."""


def privacy_of(config: Config) -> dict[str, Any]:
    """Returns plain values: the privacy cost of each kind of client (those with equal plans), and epsilon over the rounds.

    Raises UserError if the run claims no privacy or a budget cannot be kept.
    """
    if config.privacy.unit is PrivacyUnit.none:
        raise UserError("privacy.unit: expected a unit to protect, got none; add privacy=example or privacy=client.")
    config = effective(config)
    accountant = config.privacy.accountant.name
    names = COMPARED if accountant in COMPARED else (accountant,)
    shards = assign_examples(config, load(config.data, config.seed).train).shards
    kinds = Counter(plan(config, [len(shard) for shard in shards]))
    by_size = sorted(kinds.items(), key=lambda item: item[0].num_examples)
    worst = max(kinds, key=lambda each: epsilon(each.mechanisms, each.delta, accountant))
    rounds = sorted({max(1, round(worst.rounds * part / MOST_ROUNDS)) for part in range(1, MOST_ROUNDS + 1)}) if worst.rounds else []
    return {
        "unit": config.privacy.unit.name,
        "clip_norm": config.privacy.clip_norm,
        "init": config.adapter.init.name if config.adapter.init else None,
        "accountants": list(names),
        "clients": [{"clients": count, **_kind(each, names)} for each, count in by_size],
        "if_participation_is_known": _if_known(config, worst, names),
        "over_rounds": [{"rounds": number, **_epsilons(_up_to(worst, number), worst.delta, names)} for number in rounds],
    }


def privacy_table(found: dict[str, Any]) -> str:
    """Returns the tables of `privacy_of` as text."""
    unit = "examples" if found["unit"] == "example" else "of them in all"
    names = found["accountants"]
    head = ["clients", unit, "sampling rate", "steps", "delta", "noise", f"epsilon {names[0]}", *names[1:], "of it initialisation"]
    rows = [
        [
            str(row["clients"]),
            f"{row['num_examples']:,}",
            f"{row['sampling_rate']:.4f}",
            str(row["steps"]),
            f"{row['delta']:.2g}",
            f"{row['noise_multiplier']:.4f}",
            *(_written(row[name]) for name in (*(f"epsilon_{name}" for name in names), f"initialization_{names[0]}")),
        ]
        for row in found["clients"]
    ]
    over = [[str(row["rounds"]), *(_written(row[f"epsilon_{name}"]) for name in names)] for row in found["over_rounds"]]
    known = found["if_participation_is_known"]
    lines = [f"{found['unit']}-level, clip norm {found['clip_norm']:g}, initialisation {found['init']}", "", table(head, rows)]
    lines += loose_delta_lines(max(row["delta"] for row in found["clients"]))
    if over:
        lines += [
            "",
            "the client that spends most, after so many of its rounds",
            table(["rounds", f"epsilon {names[0]}", *names[1:]], over),
        ]
    if known:
        epsilons = ", ".join(f"{_written(row[f'epsilon_{names[0]}'])} of one that took part in {row['rounds']}" for row in known)
        lines += [
            "",
            "These figures assume an observer who does not know who took part in which round. The run folder records it (events.jsonl,",
            f"journal.jsonl, communication.csv); against those who have seen it epsilon is {epsilons} rounds.",
        ]
    return "\n".join(lines)


def _written(value: float) -> str:
    """Returns an epsilon with three decimals, below 0.1 with three significant digits so that it does not read as 0."""
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.3g}"


def _if_known(config: Config, each: ClientPlan, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns epsilon without amplification by secret participation, for one round and for a client's expected number of rounds."""
    if not central_privacy(config) or each.rate == 1 or not each.rounds:
        return []
    found = []
    for taken in sorted({1, ceil(each.rate * each.rounds)}):
        known = replace(each.round_mechanism, sampling_rate=1.0, steps=taken)
        found.append({"rounds": taken, **_epsilons([known], each.delta, names)})
    return found


def _kind(each: ClientPlan, names: Sequence[str]) -> dict[str, Any]:
    first = [each.initialization] if each.initialization else []
    return {
        "num_examples": each.num_examples,
        "sampling_rate": each.rate,
        "steps": each.steps * each.rounds,
        "delta": each.delta,
        "noise_multiplier": each.noise_multiplier,
        "initialization_noise_multiplier": each.initialization.noise_multiplier if each.initialization else None,
        **_epsilons(each.mechanisms, each.delta, names),
        f"initialization_{names[0]}": epsilon(first, each.delta, names[0]),
    }


def _epsilons(history: list[Mechanism], delta: float, names: Sequence[str]) -> dict[str, float]:
    return {f"epsilon_{name}": epsilon(history, delta, name) for name in names}


def _up_to(each: ClientPlan, rounds: int) -> list[Mechanism]:
    first = [each.initialization] if each.initialization else []
    return [*first, replace(each.round_mechanism, steps=each.steps * rounds)]

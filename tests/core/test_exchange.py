"""The exchange against clients that hold actual values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.choices import Init
from fedsim.core.communication import Purpose
from fedsim.core.exchange import Exchange
from fedsim.core.methods import METHODS
from fedsim.core.traffic import down_sizes, starting_exchange

CLIENTS = 4
PARTS = ("B", "R", "A", "W")


class World:
    """Clients with values of their parts, a server whose parts change, and an exchange that only tracks them.

    A value is the round that made it; that of W lists every round that added to it.
    """

    def __init__(self, derived, rederived):
        self.exchange = Exchange(dict.fromkeys(PARTS, 0), frozenset({*derived, *rederived}), frozenset(rederived))
        self.rederived = rederived
        self.server = {"B": 0, "R": 0, "A": 0, "W": ()}
        held = {part: self.server[part] for part in {*derived, *rederived}}
        self.clients = [dict(held) for _ in range(CLIENTS)]
        self.base = None  # the values that the last increment of W builds on

    def send(self, client, parts):
        mine, exchange = self.clients[client], self.exchange
        lacking = exchange.lacking(client)
        for part in PARTS:
            has_current = part in mine and (part in self.rederived or mine[part] == self.server[part])
            assert (part not in lacking) == has_current
        if "W" in lacking:
            can = self.base is not None and all(
                part in self.rederived or (part in mine and mine[part] == value) for part, value in self.base.items()
            )
            assert exchange.takes_increment(client) == can
        exchange.sent(client, parts)
        mine |= {part: self.server[part] for part in parts}

    def change(self, parts, number):
        self.exchange.changed(parts, number)
        self.server |= dict.fromkeys(parts, number)

    def add(self, number, builds_on):
        self.exchange.added(number, builds_on)
        self.base = None if builds_on is None else {part: self.server[part] for part in ("W", *builds_on)}
        self.server["W"] = (*self.server["W"], number)


KINDS = st.sets(st.sampled_from(["B", "R", "A"]))


@given(st.data(), KINDS, st.sampled_from([(), ("B", "A"), ("B", "R", "A")]))
def test_the_exchange_tracks_what_clients_actually_hold(data, derived, rederived):
    world = World({"W", *derived}, rederived)
    for number in range(1, data.draw(st.integers(1, 6)) + 1):
        for client in data.draw(st.sets(st.integers(0, CLIENTS - 1))):
            world.send(client, data.draw(st.sampled_from([PARTS, ("W",)])))
        world.change(data.draw(KINDS), number)
        if data.draw(st.booleans()):
            world.add(number, data.draw(st.sampled_from([None, (), ("B", "A")])))
            world.change(data.draw(st.sampled_from([(), ("B", "R", "A")])), number)


@pytest.mark.parametrize(
    ("method", "init", "lacking"),
    [
        ("fed_sb", Init.gradient, "BRA"),
        ("fed_sb", Init.orthogonal, "R"),
        ("lora_xs", Init.weight_svd, "R"),
        ("fedit", Init.lora, "BA"),
        ("ffa_lora", Init.lora, "B"),
        ("fedex_lora", Init.lora, "BA"),
        ("flora", Init.lora, ""),
        ("flexlora", Init.lora, "BA"),
        ("rolora", Init.lora, "B"),
        ("fedsvd", Init.lora, "B"),
        ("fedsa_lora", Init.lora, "A"),
        ("ravan", Init.orthogonal, "H"),
        ("full", Init.zero, "D"),
    ],
)
def test_the_parts_that_a_client_lacks_before_its_first_round(method, init, lacking):
    assert set(starting_exchange(METHODS[method], init, scaffold=False).lacking(0)) == set(lacking)
    assert set(starting_exchange(METHODS[method], init, scaffold=True).lacking(0)) == {*lacking, "c"}


def sizes_of(parts, *, increment_fits):
    exchange = Exchange(dict.fromkeys((*"BRA", "W", "c"), 0), frozenset("W"))
    exchange.added(1, () if increment_fits else None)
    sizes = {"R": 9, "B": 30, "A": 60, "c": 7}
    found = down_sizes(exchange, ("R",), 0, parts, lambda kinds: sum(sizes[kind] for kind in kinds), 1000, 10)
    return dict(found)


def test_adapter_bases_fold_and_control_variates_are_counted_separately():
    assert sizes_of([], increment_fits=True) == {}
    assert sizes_of(["B", "R", "A"], increment_fits=True) == {Purpose.adapter: 9, Purpose.bases: 90}
    assert sizes_of(["R", "W", "c"], increment_fits=True) == {Purpose.adapter: 9, Purpose.fold: 10, Purpose.control: 7}
    assert sizes_of(["W"], increment_fits=False) == {Purpose.fold: 1000}

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.network import POPULATIONS, Link, RoundEnd, draw_links, dropout_rates, round_end

LINK = Link(uplink=8e6, downlink=80e6, latency=0.25, dropout=0.1, speed=50.0)


def test_a_clients_time_matches_a_hand_computation():
    assert LINK.seconds(bytes_down=20e6, tokens=100, bytes_up=3e6) == pytest.approx(0.25 + 2.0 + 2.0 + 0.25 + 3.0)
    assert LINK.seconds(0, 0, 0) == 0.5


def test_links_are_drawn_from_the_seed_around_the_medians():
    drawn = draw_links(POPULATIONS["mobile"], 4001, num_parameters=1_000_000, seed=3)
    assert drawn == draw_links(POPULATIONS["mobile"], 4001, 1_000_000, 3) != draw_links(POPULATIONS["mobile"], 4001, 1_000_000, 4)
    logs = np.log([[link.uplink, link.downlink, link.speed] for link in drawn])
    np.testing.assert_allclose(np.exp(np.median(logs, axis=0)), [9e6, 34e6, 1e11 / 6e6], rtol=0.06)
    np.testing.assert_allclose(logs.std(axis=0), [1.0, 1.0, 0.7], rtol=0.05)
    assert {(link.latency, link.dropout) for link in drawn} == {(0.014, 0.05)}


def test_more_clients_do_not_change_the_first_links_and_uniform_links_are_equal():
    assert draw_links(POPULATIONS["broadband"], 9, 100, 0)[:5] == draw_links(POPULATIONS["broadband"], 5, 100, 0)
    assert len(set(draw_links(POPULATIONS["uniform"], 9, 100, 0))) == 1


def test_the_dropout_rates_of_a_link_and_of_all_clients_combine_as_independent():
    assert dropout_rates([LINK, Link(1, 1, 0, 0.0, 1)], 0.5) == pytest.approx([0.55, 0.5])


TIMES = {0: 5.0, 1: 1.0, 2: 3.0, 3: 9.0}


@pytest.mark.parametrize(
    ("wanted", "least", "deadline", "seconds", "arrived"),
    [
        (4, 2, None, 9.0, (1, 2, 0, 3)),  # waits for all
        (3, 2, None, 5.0, (1, 2, 0)),  # not for a spare client
        (4, 2, 6.0, 6.0, (1, 2, 0)),  # the deadline
        (4, 2, 2.0, 3.0, (1, 2)),  # the deadline, extended to reach the quorum
        (2, 1, 6.0, 3.0, (1, 2)),  # as many as wanted before the deadline
        (6, 2, None, 9.0, (1, 2, 0, 3)),  # two have dropped out, which is known
        (6, 2, 20.0, 20.0, (1, 2, 0, 3)),  # two have dropped out: waits until the deadline
        (6, 5, 2.0, 9.0, (1, 2, 0, 3)),  # the quorum is out of reach: takes every reply
    ],
)
def test_a_round_ends_with_enough_replies_or_at_the_deadline(wanted, least, deadline, seconds, arrived):
    assert round_end(TIMES, wanted, least, deadline) == RoundEnd(seconds, arrived)


def test_simultaneous_replies_are_ordered_by_client_and_no_reply_waits_for_the_deadline():
    assert round_end({5: 1.0, 2: 1.0, 9: 1.0}, 2, 1, None) == RoundEnd(1.0, (2, 5))
    assert round_end({}, 3, 1, 7.0) == RoundEnd(7.0, ())


@given(
    st.dictionaries(st.integers(0, 30), st.floats(0.1, 100), min_size=1),
    st.integers(1, 40),
    st.integers(0, 40),
    st.none() | st.floats(0.5, 120),
)
def test_no_reply_left_out_is_earlier_than_one_taken(times, wanted, least, deadline):
    found = round_end(times, wanted, least, deadline)
    assert len(found.arrived) >= min(wanted, least, len(times))
    left = [times[client] for client in times if client not in found.arrived]
    assert max((times[client] for client in found.arrived), default=0.0) <= min([*left, math.inf])
    assert len(found.arrived) == wanted or all(each > found.seconds for each in left)

"""How many clients of a round a fraction means."""

from fractions import Fraction
from math import ceil

from fedsim.config import Config, FederationConfig
from fedsim.core.participation import ceil_fraction, least_replies, spares


def test_a_fraction_of_clients_is_counted_as_the_decimal_that_is_written():
    for hundredths in range(101):
        for whole in (1, 3, 7, 25, 100, 999):
            assert ceil_fraction(hundredths / 100, whole) == ceil(Fraction(hundredths, 100) * whole), (hundredths, whole)


def test_min_replies_and_over_selection_give_the_configured_counts():
    assert least_replies(Config(federation=FederationConfig(min_replies=0.56)), 25) == 14
    config = Config(federation=FederationConfig(clients=100, fraction=0.25, over_selection=0.28))
    assert len(spares(config, 1)) == 7

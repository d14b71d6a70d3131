import math

import pytest

from fedsim.config import Config
from fedsim.core.network import Link
from fedsim.errors import UserError
from fedsim.links import links_of


def links_for(network, clients=3):
    """Returns the links of a configuration with this network."""
    config = Config()
    config.federation.network, config.federation.clients = str(network), clients
    return links_of(config, num_parameters=1000)


def test_clients_take_the_rows_of_a_file_in_turn(tmp_path):
    yaml_file, csv_file = tmp_path / "links.yaml", tmp_path / "links.csv"
    yaml_file.write_text("- {uplink: 1e6, downlink: 2e6, latency: 0.1, dropout: 0.2, speed: 30}\n- {uplink: 4e6, downlink: 5e6}\n")
    csv_file.write_text("uplink,downlink,latency,dropout,speed\n1e6,2e6,0.1,0.2,30\n4e6,5e6,0,0,inf\n")
    slow, fast = Link(1e6, 2e6, 0.1, 0.2, 30.0), Link(4e6, 5e6, 0.0, 0.0, math.inf)
    assert links_for(yaml_file) == links_for(csv_file) == [slow, fast, slow]


def test_network_none_has_no_links_and_a_known_network_has_one_per_client():
    assert links_for("none") is None
    assert len(links_for("broadband", clients=7)) == 7


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "a list of clients"),
        ("a: 1", "a list of clients"),
        ("- {uplink: 1}", "client 0: expected uplink, downlink"),
        ("- {uplink: 1, downlink: 1, colour: 2}", "colour"),
        ("- {uplink: fast, downlink: 1}", "numbers"),
        ("- {uplink: 0, downlink: 1}", "above 0"),
        ("- {uplink: 1, downlink: 1, dropout: 1}", "dropout below 1"),
        ("- {uplink: 1, downlink: 1, latency: .nan}", "latency of 0"),
        ("- {uplink: 1, downlink: .nan}", "above 0"),
        ("- [", "YAML or CSV"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "links.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        links_for(path)


def test_a_name_that_is_neither_known_nor_a_file_is_refused():
    with pytest.raises(UserError, match="Did you mean 'mobile'"):
        links_for("moblie")

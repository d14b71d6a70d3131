"""Secure aggregation between owners: each client is its own desk, whose memory outlives its messages."""

from dataclasses import replace

import pytest
from flower.rounds import Rounds, changed, of_method

from clients.desk import Desk
from clients.owner import Owner, RefusedError, accept
from fedsim.choices import Init
from fedsim.core.missing import Reason
from fedsim.errors import RunStopped
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.strategy import FedsimStrategy
from fedsim.session import forget_session

SECURE = {"privacy": {"secure_aggregation": True}, "secure": {"bits": 20, "range": 4.0}}


class Desks(Rounds):
    """Rounds in which node k + 1 is the desk of client k."""

    def __init__(self, folder, config, **owners):
        super().__init__(config, workers=3)
        self.desks = [Desk(Owner(client, shard=True, folder=str(folder / str(client)), **owners)) for client in range(3)]
        self.grid = InProcessGrid(lambda message, context: self.desks[message.metadata.dst_node_id - 1].answer(message), 3)
        client_nodes = lambda clients: {client: client + 1 for client in clients}  # noqa: E731
        self.strategy = FedsimStrategy(self.session, config, self.ledger, self.state, client_nodes=client_nodes)


def largest_gap(one, other):
    return max(float((tensor - other.state.factors[name]).abs().max()) for name, tensor in one.state.factors.items())


def test_desks_with_masked_only_give_the_result_of_a_simulation(tmp_path):
    config = of_method("fed_sb", **SECURE)
    desks = Desks(tmp_path, config, masked_only=True).next(2)
    assert desks.strategy.facts.clients == [0, 1, 2]
    assert largest_gap(desks, Rounds(config).next(2)) <= 3 * 3 * 4.0 / (2**19 - 1)
    assert not any(b"party" in path.read_bytes() for path in tmp_path.glob("*/memory/*")), "secrets are gone after the round"


def test_a_desk_that_lacks_the_state_is_asked_again_and_then_sends_a_masked_upload(tmp_path):
    config = changed(of_method("fed_sb", **SECURE), adapter={"init": Init.gradient})
    desks = Desks(tmp_path, config)
    for client in range(3):
        desks.state.exchange.sent(client, ("B", "A"))  # so that no message brings them
    forget_session()  # as if the workers had just started
    desks.strategy.exchange(1, desks.grid)
    assert desks.strategy.facts.clients == [0, 1, 2]
    assert largest_gap(desks, Rounds(of_method("fed_sb", **SECURE)).next()) <= 3 * 3 * 4.0 / (2**19 - 1)


def test_an_owner_with_masked_only_refuses_uploads_that_are_not_masked(tmp_path):
    plain = of_method("fed_sb")
    with pytest.raises(RefusedError, match="masked_only takes sums of several clients"):
        accept(Owner(0, masked_only=True), plain)
    accept(Owner(0, masked_only=True), replace(plain, privacy=replace(plain.privacy, secure_aggregation=True)))
    desks = Desks(tmp_path, plain, masked_only=True)
    with pytest.raises(RunStopped, match="3 refused by client"):
        desks.strategy.exchange(1, desks.grid)
    assert {each.reason for each in desks.strategy.facts.missing} == {Reason.refused_by_client}

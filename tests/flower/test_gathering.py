"""The order of replies does not change the result of a simulated round."""

import pytest
from rounds import Rounds, of_method

from clients.app import app
from fedsim.core.payload import digest
from fedsim.flower.grid import InProcessGrid, WatchedGrid


class BackwardsGrid(InProcessGrid):
    """Answers the last waiting message first; records the order of replies and the largest number of waiting messages."""

    def __init__(self, workers):
        super().__init__(app, workers)
        self.order, self.most = [], 0

    def pull_messages(self, message_ids):
        waiting = [message_id for message_id in message_ids if message_id in self._pending]
        self.most = max(self.most, len(waiting))
        self.order += [self._pending[message_id].content["request"]["clients"][0] for message_id in waiting[-1:]]
        return super().pull_messages(waiting[-1:])


def rounds_of(config, grid, client_nodes=None):
    rounds = Rounds(config, workers=2)
    rounds.grid = grid(2)
    rounds.strategy.asking.client_nodes = client_nodes
    return rounds.next(2)


@pytest.mark.parametrize(
    ("method", "federation"),
    [("flora", {"clients": 7}), ("fed_sb", {"clients": 8, "fraction": 0.5, "over_selection": 0.75}), ("fed_sb", {"clients": 7})],
)
def test_the_order_of_replies_does_not_change_a_simulation(method, federation):
    config = of_method(method, federation=federation, engine={"cohort_size": 1})
    straight = rounds_of(config, lambda workers: InProcessGrid(app, workers))
    backwards = rounds_of(config, BackwardsGrid)
    assert backwards.grid.order != sorted(backwards.grid.order), "otherwise this would tell nothing"
    assert backwards.strategy.facts.clients == straight.strategy.facts.clients
    assert digest(backwards.state.factors) == digest(straight.state.factors)
    assert backwards.state.digests() == straight.state.digests()


def test_buffered_replies_count_towards_the_messages_in_flight():
    """Otherwise, during one slow reply, uploads of all other workers would fill the server's memory."""
    config = of_method("fed_sb", federation={"clients": 12}, engine={"cohort_size": 1})
    backwards = rounds_of(config, BackwardsGrid)
    assert backwards.grid.order[:4] == [3, 2, 1, 0], "no fifth message before the first is answered"
    assert backwards.grid.most == 4


def test_an_in_process_grid_drops_messages_that_nobody_waits_for():
    config = of_method("fed_sb", federation={"clients": 8, "fraction": 0.5, "over_selection": 0.75}, engine={"cohort_size": 1})
    rounds = Rounds(config, workers=2)
    own, sent, seen = rounds.grid, [], []
    push = own.push_messages
    own.push_messages = lambda messages: [*map(sent.append, messages)] and push(sent[-1:])
    rounds.grid = WatchedGrid(own, seen.append)
    rounds.next(3)
    assert len(sent) > len(seen), "otherwise none was left"
    assert own._pending == {}


def test_a_deployment_takes_replies_in_order_of_arrival():
    config = of_method("fed_sb", federation={"clients": 4})
    rounds = rounds_of(config, BackwardsGrid, client_nodes=lambda clients: {client: 1 + client % 2 for client in clients})
    assert rounds.strategy.facts.clients == [3, 2, 1, 0]

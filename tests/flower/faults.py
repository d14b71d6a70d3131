"""A Grid that injects faults: each client has its own node, and real messages go through the real ClientApp."""

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from rounds import Rounds

from clients.app import app
from fedsim.flower.grid import InProcessGrid

SILENT = "silent"


class FaultyGrid(InProcessGrid):
    """Node k + 1 is client k. `faults` maps (round, client) to SILENT, an error text, or a function that changes the reply."""

    def __init__(self, clients, faults):
        super().__init__(app, clients)
        self.faults = faults
        self.asked = []  # (round, client) of each pushed message
        self.down = set()  # clients whose node is not connected

    def push_messages(self, messages):
        messages = list(messages)
        self.asked += [place(message) for message in messages]
        return super().push_messages(messages)

    def forget(self, message_ids):
        """Keeps all messages, as a SuperLink does."""

    def pull_messages(self, message_ids):
        for message_id in message_ids:
            if message_id not in self._pending:
                continue
            fault = self.faults.get(place(self._pending[message_id]))
            if fault == SILENT:
                continue
            if isinstance(fault, str):
                return [Message(Error(1, fault), reply_to=self._pending.pop(message_id))]
            reply = self._handle(self._pending.pop(message_id))
            return [reply if fault is None else fault(reply)]
        return []


def place(message):
    return int(message.metadata.group_id), message.metadata.dst_node_id - 1


def faulty(config, faults, prepare=lambda factors: None):
    """Returns `Rounds` over a `FaultyGrid`."""
    run = Rounds(config, prepare)
    run.grid = FaultyGrid(config.federation.clients, faults)
    run.strategy.asking.client_nodes = lambda clients: {client: client + 1 for client in clients if client not in run.grid.down}
    return run


def rebuilt(reply, metrics=None, **records):
    """Returns the reply with the given metrics and records replaced; None removes one."""
    old = reply.content
    values = {**old.metric_records["metrics"], **(metrics or {})}
    content = {**old.array_records, "metrics": MetricRecord({name: value for name, value in values.items() if value is not None})}
    content |= {name.replace("_", "-"): record for name, record in records.items()}
    kept = {name: record for name, record in content.items() if isinstance(record, ArrayRecord | MetricRecord | ConfigRecord)}
    return Message(RecordDict(kept), metadata=reply.metadata)

"""The same experiment through Flower's own simulation: Ray actors, stock FedAvg, peft and the Hugging Face Trainer in each client.

Runs in its own process: `call("experiments.benchmarks.peers.flower_ray", {...})` returns the seconds of every round. Without a workload
the clients do nothing. Ray finds the client app by importing this module, so an actor keeps its model from round to round.
"""

import json
import os
import time
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.benchmarks.peers import peft_trainer
from experiments.benchmarks.processes import answer, asked
from experiments.benchmarks.workloads import Workload

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains one client, or returns the received arrays if there is no workload."""
    config = message.content.config_records["config"]
    arrays, num_examples = message.content.array_records["arrays"], 1
    if config["workload"]:
        torch.set_num_threads(1)  # one actor per core
        workload = Workload(**json.loads(str(config["workload"])))
        model = _model(workload.model, workload.rank)
        start = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
        client = workload.client(int(context.node_config["partition-id"]), model.config.vocab_size)
        peft_trainer.train_client(model, start, client, workload.training)
        arrays = ArrayRecord({name: parameter.detach() for name, parameter in peft_trainer.trained(model).items()})
        num_examples = len(client.examples)
    metrics = MetricRecord({"num-examples": num_examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@lru_cache(maxsize=1)
def _model(name: str, rank: int) -> Any:
    return peft_trainer.peft_model(name, rank)


class _Timed(FedAvg):
    """FedAvg that records when each round ends."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.marks = [time.perf_counter()]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        good = sum(reply.has_content() for reply in replies)
        if good != self.min_train_nodes:  # FedAvg would continue with the others
            raise RuntimeError(f"{good} of {self.min_train_nodes} clients answered")
        found = super().aggregate_train(server_round, replies)
        self.marks.append(time.perf_counter())
        return found


def simulate(clients: int, rounds: int, workload: dict[str, Any] | None) -> list[float]:
    """Returns the seconds of every round; the first includes starting the actors and loading their models."""
    from flwr.simulation import run_simulation

    strategy, server = _Timed(clients), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = {"R": torch.zeros(28 * 64 * 64)}  # the size of the embedded model's R at rank 64
        if workload:
            arrays = peft_trainer.trained(_model(workload["model"], workload["rank"]))
        strategy.marks = [time.perf_counter()]
        told = ConfigRecord({"workload": json.dumps(workload) if workload else ""})
        strategy.start(grid, ArrayRecord({name: value.detach() for name, value in arrays.items()}), rounds, train_config=told)

    cores = len(os.sched_getaffinity(0))
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    run_simulation(server, app, clients, backend_config=resources)  # type: ignore[arg-type]
    return [after - before for before, after in zip(strategy.marks, strategy.marks[1:], strict=False)]


if __name__ == "__main__":
    from experiments.benchmarks.peers import flower_ray  # the module that Ray imports, not this copy of it named __main__

    answer({"seconds": flower_ray.simulate(**asked())})

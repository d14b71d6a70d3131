"""Runs rounds through Flower's messages one at a time, over a global state that tests may inspect and change."""

from dataclasses import replace

import numpy as np

from clients.app import app
from fedsim.choices import Init, Optimizer, Schedule
from fedsim.config import AdapterConfig, Config, DataConfig, EvaluationConfig, FederationConfig, MethodConfig, TrainingConfig
from fedsim.core.communication import CommunicationLedger
from fedsim.core.initialization import from_seed
from fedsim.core.methods import METHODS
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.strategy import FedsimStrategy
from fedsim.flower.worker import read_memory
from fedsim.session import open_session

TARGETS = ["layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"]
RATE, RANK, SCALING, CLIENTS = 2.0, 3, 0.5, 3  # the Oracle in test_methods uses this rate
BASE = Config(
    adapter=AdapterConfig(rank=RANK, scaling=SCALING, target_modules=TARGETS),
    data=DataConfig(train_examples=24, test_examples=4),
    federation=FederationConfig(clients=CLIENTS, rounds=2, quantity_sigma=0.7),
    training=TrainingConfig(
        batch_size=3, local_steps=2, learning_rate=RATE, optimizer=Optimizer.sgd, schedule=Schedule.constant, warmup_ratio=0.0
    ),
    evaluation=EvaluationConfig(diagnosis=False),
)


def changed(config=BASE, **sections):
    """Returns the configuration with the given options of its sections replaced."""
    return replace(config, **{name: replace(getattr(config, name), **options) for name, options in sections.items()})


def of_method(name, **sections):
    """Configures the method for three unequal clients on two layers; methods that allow it start from seeded orthogonal bases."""
    config = replace(BASE, method=MethodConfig(name=name, heads=2))
    init = Init.orthogonal if Init.orthogonal in METHODS[name].inits else None
    return changed(config, **{**sections, "adapter": {"init": init, **sections.get("adapter", {})}})


class Rounds:
    """A run of a configuration. `prepare` may change the factors, {name: tensor}, before the first round."""

    def __init__(self, config, prepare=lambda factors: None, workers=1):
        self.session, self.ledger = open_session(config), CommunicationLedger()
        self.session.install_folded({}, "")
        derived = self.session.derived_factors(1) or from_seed(self.session.spec, {}, config.seed)  # seeded instead of gradients
        self.start = {name: tensor.clone() for name, tensor in derived.items()}
        prepare(self.start)
        self.state = self.session.initial_state({name: tensor.clone() for name, tensor in self.start.items()})
        self.strategy = FedsimStrategy(self.session, config, self.ledger, self.state)
        self.grid = InProcessGrid(app, workers)
        self.number = 0

    def next(self, count=1):
        """Runs `count` rounds."""
        for _ in range(count):
            self.number += 1
            self.session.install_state(self.state)
            self.strategy.exchange(self.number, self.grid)
        return self

    def messages(self, number):
        """Returns the training requests of a round, as `exchange` makes them."""
        strategy = self.strategy
        clients = strategy.participants(number)
        return [ask.message for ask in strategy.asking.to_train(number, strategy._packer(), self.grid, clients)]

    @property
    def spec(self):
        return self.session.spec

    @property
    def counts(self):
        """Each client's number of examples."""
        counts = np.array([len(shard) for shard in self.session.shards], dtype=float)
        assert len(set(counts)) > 1, "equal clients would not tell weightings apart"
        return counts

    def shares(self, clients):
        """Returns the clients' weights, which sum to one."""
        return self.counts[list(clients)] / self.counts[list(clients)].sum()

    def flat(self, *kinds):
        """Returns the global factors of the given kinds as one vector."""
        return self.spec.pack(self.state.factors, kinds)

    def change(self):
        """Returns each layer's weight update since the start of the run."""
        folded, factors = self.state.folded, self.state.factors
        return {layer: (self.spec.update(factors, layer) + folded.get(layer, 0.0)).double() for layer in self.spec.layers}

    def kept(self, client):
        """Returns the state that a client of the first worker keeps after the last round, as flat arrays by name."""
        return read_memory(self.grid.contexts[1], [client], self.state.accepted)[client]

    def moved(self, column="parameters", **wanted):
        """Returns the sum of a ledger column over the rows with the given values, such as client=0, direction="uplink"."""
        return sum(row[column] for row in self.ledger.rows() if all(row[name] == value for name, value in wanted.items()))

    def totals_by_client(self):
        """Returns each client's ledger totals."""
        ledgers = {}
        for row in self.ledger.rows():
            ledgers.setdefault(row["client"], CommunicationLedger()).add_rows([row])
        return {client: ledger.totals() for client, ledger in ledgers.items()}

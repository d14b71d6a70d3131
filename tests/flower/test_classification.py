"""Classification heads with every method: a dense autograd oracle, the ledger, and whole runs of a tiny BERT."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LABELS, save_classifier, write_sick

from clients.app import app
from fedsim.choices import Init, Optimizer, PrivacyUnit, Schedule
from fedsim.config import AdapterConfig, Config, DataConfig, EvaluationConfig, FederationConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedsim.core.adapters import adapted_layers
from fedsim.core.communication import CommunicationLedger
from fedsim.core.cost import charges
from fedsim.core.forms import HEAD
from fedsim.core.methods import METHODS
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.strategy import FedsimStrategy
from fedsim.models import load_model
from fedsim.session import open_session
from fedsim.training.batches import local_batches

RATE, RANK, SCALING, CLIENTS = 0.5, 3, 0.5, 3
TARGETS = ["layer.0.attention.self.query", "layer.1.output.dense"]
CLASSIFIER, HEAD_SIZE = f"classifier.{HEAD}", 3 * 33


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nli")
    return Config(
        model=ModelConfig(name="tiny", path=save_classifier(folder / "model"), device="cpu"),
        adapter=AdapterConfig(rank=RANK, scaling=SCALING, target_modules=TARGETS, init_samples=6),
        data=DataConfig(name="sick", train=["sick"], test=["sick"], path=write_sick(folder / "SICK.txt"), max_length=32),
        federation=FederationConfig(clients=CLIENTS, rounds=2, quantity_sigma=0.7),
        training=TrainingConfig(
            batch_size=3, local_steps=2, learning_rate=RATE, optimizer=Optimizer.sgd, schedule=Schedule.constant, warmup_ratio=0.0
        ),
        evaluation=EvaluationConfig(diagnosis=True),
    )


def of_method(base, name, **sections):
    init = Init.orthogonal if name in ("fed_sb", "centralized") else None
    options = {"adapter": {"init": init}, "method": {"name": name, "heads": 2}, **sections}
    return replace(base, **{section: replace(getattr(base, section), **values) for section, values in options.items()})


class Run:
    """A run of a method through Flower's messages, which keeps the server's final state."""

    def __init__(self, config, rounds=2):
        self.session, self.ledger, self.config = open_session(config), CommunicationLedger(), config
        self.session.install_folded({}, "")
        self.state = self.session.initial_state({key: value.clone() for key, value in self.session.derived_factors(1).items()})
        self.start = dict(self.state.factors)
        strategy, grid = FedsimStrategy(self.session, config, self.ledger, self.state), InProcessGrid(app)
        for number in range(1, rounds + 1):
            self.session.install_state(self.state)
            strategy.exchange(number, grid)

    @property
    def shares(self):
        counts = np.array([len(shard) for shard in self.session.shards], dtype=float)
        return counts / counts.sum()

    def moved(self, **wanted):
        return sum(row["parameters"] for row in self.ledger.rows() if all(row[name] == value for name, value in wanted.items()))


class Oracle:
    """A plain Hugging Face classifier in float64: dense weights, one pair at a time, without padding."""

    def __init__(self, run):
        self.session = run.session
        self.model = load_model(run.config.model, LABELS)[0].double()
        self.names = list(adapted_layers(run.session.model))
        self.base = {name: self.model.get_submodule(name).weight.detach().clone() for name in self.names}

    def gradients(self, changes, head, client, round_, step):
        """Returns the gradients of the client's mean batch loss: of each dense weight base + change, and of the head [W | b]."""
        data = self.session.client_data(client)
        lengths = [example.num_tokens for example in data.examples]
        batch = local_batches(lengths, self.session.config.training, seed=0, round=round_, client=client)[step]
        weights = [self.model.get_submodule(name).weight for name in self.names]
        classifier = self.model.classifier
        classifier.weight.data, classifier.bias.data = head[:, :-1].clone(), head[:, -1].clone()
        leaves = [*weights, classifier.weight, classifier.bias]
        for leaf in leaves:
            leaf.requires_grad_(True)
        for weight, name in zip(weights, self.names, strict=True):
            weight.data = self.base[name] + changes[name]
        total = 0
        for i in batch:
            pair = data.examples[i]
            inputs = {"input_ids": torch.tensor([pair.input_ids.tolist()]), "token_type_ids": torch.tensor([pair.segments.tolist()])}
            total = total + self.model(**inputs, labels=torch.tensor([pair.label])).loss / len(batch)
        *found, weight, bias = torch.autograd.grad(total, leaves)
        return dict(zip(self.names, found, strict=True)), torch.cat([weight, bias[:, None]], dim=1)

    def train(self, factors, head, trained, dense, chain_rule, client, round_):
        """Takes two SGD steps on the trained kinds of {layer: {kind: tensor}} and on the head."""
        mine = {name: {kind: tensor.clone() for kind, tensor in own.items()} for name, own in factors.items()}
        for step in range(2):
            found, head_gradient = self.gradients({name: dense(own) for name, own in mine.items()}, head, client, round_, step)
            for name, gradient in found.items():
                by_kind = chain_rule(gradient, mine[name])
                for kind in trained:
                    mine[name][kind] = mine[name][kind] - RATE * by_kind[kind]
            head = head - RATE * head_gradient
        return mine, head


def lora_dense(own):
    return SCALING * own["B"] @ own["A"]


def lora_rule(gradient, own):
    return {"B": SCALING * gradient @ own["A"].T, "A": SCALING * own["B"].T @ gradient}


def sb_dense(own):
    return SCALING * own["B"] @ own["R"] @ own["A"]


def sb_rule(gradient, own):
    return {"R": SCALING * own["B"].T @ gradient @ own["A"].T}


@pytest.mark.parametrize(
    ("name", "kinds", "trained", "dense", "rule"),
    [
        ("fed_sb", "BRA", "R", sb_dense, sb_rule),
        ("fedit", "BA", "BA", lora_dense, lora_rule),
        ("ffa_lora", "BA", "B", lora_dense, lora_rule),
    ],
)
def test_factors_and_head_match_the_mean_of_clients_trained_on_dense_weights(base, name, kinds, trained, dense, rule):
    run_ = Run(of_method(base, name))
    oracle, shares = Oracle(run_), run_.shares
    factors = {layer: {kind: run_.start[f"{layer}.{kind}"].double() for kind in kinds} for layer in oracle.names}
    head = run_.start[CLASSIFIER].double()
    for round_ in (1, 2):
        clients = [oracle.train(factors, head, trained, dense, rule, client, round_) for client in range(CLIENTS)]
        for layer, own in factors.items():
            for kind in trained:
                own[kind] = sum(p * mine[layer][kind] for p, (mine, _) in zip(shares, clients, strict=True))
        head = sum(p * mine for p, (_, mine) in zip(shares, clients, strict=True))
    assert (head - run_.start[CLASSIFIER]).abs().max() > 1e-2
    torch.testing.assert_close(run_.state.factors[CLASSIFIER].double(), head, rtol=0, atol=1e-5)
    for layer, own in factors.items():
        for kind in trained:
            torch.testing.assert_close(run_.state.factors[f"{layer}.{kind}"].double(), own[kind], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_averages_the_head(base, name):
    """In the first step, from no update, the head changes by the mean of the clients' gradients under every method."""
    first = Run(of_method(base, name, training={"local_steps": 1}), rounds=1)
    oracle = Oracle(first)
    nothing = {layer: torch.zeros_like(weight) for layer, weight in oracle.base.items()}
    expected = first.start[CLASSIFIER].double()
    for client, share in enumerate(first.shares):
        expected = expected - share * RATE * oracle.gradients(nothing, first.start[CLASSIFIER].double(), client, 1, 0)[1]
    torch.testing.assert_close(first.state.factors[CLASSIFIER].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "centralized"])
def test_the_ledger_counts_the_head_and_matches_the_predicted_charges(base, name):
    config = of_method(base, name)
    done = Run(config)
    session = done.session
    own = [kind for kind in session.method.uploaded(1) if kind != HEAD]
    assert done.moved(round=1, client=0, direction="uplink") == session.spec.num_parameters(own) + HEAD_SIZE
    up = [(charge.round, charge.client, charge.parameters) for charge in charges(session.config, session.method, session.spec)]
    assert sorted(up) == sorted((row["round"], row["client"], row["parameters"]) for row in done.ledger.rows())


def test_clients_of_smaller_rank_or_fewer_ravan_heads_train_the_whole_classifier(base):
    ranks = Run(of_method(base, "flora", adapter={"rank": None}, federation={"ranks": {1: 0.5, 3: 0.5}}))
    heads = Run(of_method(base, "ravan", method={"name": "ravan", "heads": 4, "client_heads": 1}))
    for done in (ranks, heads):
        assert (done.state.factors[CLASSIFIER] - done.start[CLASSIFIER]).abs().min() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": {"name": "fed_sb"}, "adapter": {"init": Init.gradient, "refresh_every": 1}},
        {"method": {"name": "fed_sb"}, "adapter": {"init": Init.gradient_public}},
        {"method": {"name": "fedsa_lora"}},
        {
            "method": {"name": "fed_sb"},
            "adapter": {"init": Init.gradient_dp},
            "privacy": {"unit": PrivacyUnit.example, "epsilon": 8.0, "accountant": PrivacyConfig().accountant},
        },
    ],
)
def test_an_interrupted_and_resumed_run_ends_with_the_same_adapter(base, options, tmp_path, monkeypatch):
    sections = {section: replace(getattr(base, section), **values) for section, values in options.items()}
    config = replace(base, **sections, evaluation=replace(base.evaluation, every=1))
    whole = run(replace(config, run_dir=str(tmp_path / "whole")), quiet=True)
    interrupted = replace(config, run_dir=str(tmp_path / "parts"))
    original, calls = FedsimStrategy.exchange, iter((False, True))

    def stop_in_the_second_round(self, number, grid):
        if next(calls):
            raise KeyboardInterrupt
        original(self, number, grid)

    monkeypatch.setattr(FedsimStrategy, "exchange", stop_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, quiet=True)
    monkeypatch.setattr(FedsimStrategy, "exchange", original)
    resumed = run(replace(interrupted, resume=True), quiet=True)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert resumed["evaluation"] == whole["evaluation"]
    assert whole["evaluation"]["sick"]["num_examples"] == 4
    if config.privacy.unit is PrivacyUnit.example:
        assert whole["privacy"]["epsilon"] == pytest.approx(8.0, rel=2e-3)
        assert resumed["privacy"]["epsilon"] == pytest.approx(whole["privacy"]["epsilon"], rel=1e-9)


def test_the_initial_head_depends_on_the_seed_and_its_bias_is_zero(base):
    session = open_session(of_method(base, "fed_sb", adapter={"init": Init.gradient}))
    heads = [open_session(replace(session.config, seed=seed)).initial_state({}).factors[CLASSIFIER] for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not heads[0][:, -1].any(), "the bias starts at zero"
    assert float(heads[0][:, :-1].std()) == pytest.approx(0.02, rel=0.3)


def test_initial_bases_come_from_gradients_through_the_new_head(base, tmp_path):
    """A zero head would pass no gradient, and the bases would come from noise."""
    config = of_method(base, "fed_sb", adapter={"init": Init.gradient, "init_samples": 1000}, federation={"rounds": 1})
    run(replace(config, run_dir=str(tmp_path / "run")), quiet=True)
    session = open_session(config)
    found = Run(of_method(base, "fed_sb"), rounds=0)
    oracle = Oracle(found)
    expected = {layer: torch.zeros_like(weight) for layer, weight in oracle.base.items()}
    for client in range(CLIENTS):
        for pair in session.client_data(client).examples:
            weights = [oracle.model.get_submodule(name).weight.requires_grad_(True) for name in oracle.names]
            head = found.start[CLASSIFIER].double()
            oracle.model.classifier.weight.data, oracle.model.classifier.bias.data = head[:, :-1], head[:, -1]
            inputs = {"input_ids": torch.tensor([pair.input_ids.tolist()]), "token_type_ids": torch.tensor([pair.segments.tolist()])}
            loss = oracle.model(**inputs, labels=torch.tensor([pair.label])).loss
            for name, gradient in zip(oracle.names, torch.autograd.grad(loss, weights), strict=True):
                expected[name] += gradient
    for layer, gradient in expected.items():
        left, _, right = torch.linalg.svd(-gradient.sign())
        installed = adapted_layers(session.model)[layer]
        for ours, theirs in ((installed.B, left[:, :RANK]), (installed.A.T, right[:RANK].T)):
            aligned = torch.linalg.svdvals(ours.double().T @ theirs)
            torch.testing.assert_close(aligned, torch.ones_like(aligned), rtol=0, atol=1e-3)


def test_mismatched_data_and_model_kinds_are_refused(base):
    with pytest.raises(UserError, match=r"classified, which takes an encoder of the kinds bert, distilbert, roberta, got 'llama'"):
        open_session(replace(base, model=ModelConfig()))
    with pytest.raises(UserError, match=r"expected sets that one model serves, got sick \(entailment/.*, gsm8k \(answered in words\)"):
        open_session(replace(base, data=replace(base.data, test=["gsm8k"])))

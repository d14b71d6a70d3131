"""Server optimizers, robust rules and refused combinations in whole rounds."""

import numpy as np
import pytest
import torch
from rounds import Rounds, of_method

from clients.app import app
from fedsim.choices import ServerRule
from fedsim.cli.compose import compose_with_hydra, initialized, to_config
from fedsim.core.methods import METHODS
from fedsim.core.server_optimizers import SERVER_OPTIMIZERS, ServerOptions
from fedsim.errors import UserError
from fedsim.flower.aggregation import averages_exactly
from fedsim.flower.records import from_record, to_record
from fedsim.session import effective

OPTIONS = {"learning_rate": 0.03, "momentum": 0.7, "beta2": 0.95, "tau": 1e-2}


class Observed:
    """Rounds in which `attack` replaces the upload of client 3; `uploads` holds the server's view of the last round, by client."""

    def __init__(self, config, attack=lambda flat: flat):
        self.run, self.uploads = Rounds(config), {}
        self.kinds = self.run.session.method.uploaded(1)

        def observe(message, context):
            reply = app(message, context)
            for client in range(config.federation.clients):
                flat = from_record(reply.content.array_records[f"client-{client}"], self.run.spec.num_parameters(self.kinds)).clone()
                self.uploads[client] = attack(flat) if client == 3 else flat
                reply.content[f"client-{client}"] = to_record(self.uploads[client])
            return reply

        self.run.grid._app = observe

    def next(self):
        """Runs a round and returns the new flat factors and the uploads [clients, parameters], in float64."""
        new = self.run.next().flat(*self.kinds).double().numpy()
        return new, np.stack([self.uploads[client].double().numpy() for client in sorted(self.uploads)])


@pytest.mark.parametrize(("method", "optimizer"), [*(("fed_sb", name) for name in SERVER_OPTIMIZERS), ("fedit", "fedadam")])
def test_a_round_applies_the_server_optimizer_to_the_mean(method, optimizer):
    observed = Observed(of_method(method, server={"optimizer": optimizer, **OPTIONS}))
    run, state = observed.run, {}
    expected = run.flat(*observed.kinds)
    for _ in (1, 2):
        new, uploads = observed.next()
        mean = torch.from_numpy(run.shares(range(3)) @ uploads).float()
        assert (mean - expected).norm() > 1e-3
        expected, state = SERVER_OPTIMIZERS[optimizer].step(expected, mean, state, ServerOptions(**OPTIONS))
        np.testing.assert_allclose(new, expected.double().numpy(), atol=1e-6)
        assert run.state.moments.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(run.state.moments[name], tensor, rtol=1e-5, atol=1e-7)


def six_clients(**server):
    return of_method("fed_sb", federation={"clients": 6}, data={"train_examples": 60}, server=server)


def huge(flat):
    return torch.full_like(flat, 1e6)


RULES = {
    ServerRule.median: {},
    ServerRule.trimmed_mean: {"trimmed": 0.2},
    ServerRule.krum: {"malicious": 1},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_robust_rule_stays_within_the_honest_uploads_despite_one_huge_upload(rule):
    new, uploads = Observed(six_clients(rule=rule, **RULES[rule]), huge).next()
    assert (uploads[3] == 1e6).all()
    honest = np.delete(uploads, 3, axis=0)
    assert (honest.min(0) - 1e-7 <= new).all()
    assert (new <= honest.max(0) + 1e-7).all()


def test_one_huge_upload_dominates_the_mean():
    new, _ = Observed(six_clients(max_update_norm=None), huge).next()
    assert (new > 1e4).all()


def test_the_mean_is_weighted_by_examples():
    observed = Observed(six_clients())
    new, uploads = observed.next()
    np.testing.assert_allclose(new, observed.run.shares(range(6)) @ uploads, atol=1e-6)


def multi_krum(uploads, kept):
    distances = np.sort(((uploads[:, None] - uploads[None]) ** 2).sum(2), axis=1)[:, 1:]  # without the distance to itself
    return uploads[np.argsort(distances[:, : 6 - 1 - 2].sum(1))[:kept]].mean(0)


@pytest.mark.parametrize(
    ("server", "oracle"),
    [
        ({"rule": ServerRule.median}, lambda uploads: np.median(uploads, axis=0)),
        ({"rule": ServerRule.trimmed_mean, "trimmed": 0.4}, lambda uploads: np.sort(uploads, axis=0)[2:4].mean(0)),
        ({"rule": ServerRule.krum, "malicious": 1, "kept": 2}, lambda uploads: multi_krum(uploads, 2)),
        ({"rule": ServerRule.krum, "malicious": 1}, lambda uploads: multi_krum(uploads, 5)),
    ],
)
def test_robust_rules_are_unweighted(server, oracle):
    new, uploads = Observed(six_clients(**server)).next()
    np.testing.assert_allclose(new, oracle(uploads), atol=1e-7)


SGD = ("training.optimizer=sgd", "training.momentum=0")
REFUSED = [
    (("training.scaffold=true", "training.optimizer=sgd", "server.rule=median"), "control variates are averaged without median"),
    (("method=ravan", "method.client_heads=1", "server.optimizer=fedadam"), "an entry may lack an update in a round"),
    (
        ("federation.mode=fedbuff", "federation.network=broadband", "federation.buffer=2", "server.rule=krum"),
        "server.malicious: krum needs",
    ),
    (
        ("federation.mode=fedbuff", "federation.network=broadband", "federation.clients=10", "server.rule=krum", "server.malicious=3"),
        "krum needs 2 x malicious \\+ 3 clients in a round, got 3 of 5",
    ),
    (["compression.name=int7"], "compression.name: expected one of none, bfloat16"),
    (["server.optimizer=fedadm"], "server.optimizer: expected one of fedavg.*'fedadm'.*fedadam"),
    (["method=fedit", "adapter.init=orthogonal"], "method=fedit starts from lora, got orthogonal; .* for lora"),
    (["method=lora_xs", "adapter.init=gradient"], "method=lora_xs starts from weight_svd, got gradient"),
    (["method=fedit", "adapter.refresh_every=2"], "only LoRA-SB can recompute its bases, got 2 with method=fedit"),
    (["method=ravan", "adapter.refresh_every=1"], "only LoRA-SB can recompute its bases"),
    (["adapter.refresh_every=1", "adapter.init=gradient_public"], "expected equal ranks and bases from clients, weights or a seed"),
    (["adapter.refresh_every=1", "adapter.rank=null", "federation.ranks={2:1,4:1}"], "expected equal ranks"),
    (["method=flexlora", "server.optimizer=fedadam"], "flexlora redefines the factors every round"),
    (["method=rolora", "server.optimizer=fedavgm"], "rolora redefines the factors every round"),
    (["server.optimizer=fedadam", "adapter.rank=null", "federation.ranks={2:1,4:1}"], "an entry may lack an update"),
    (["method=flora", "server.learning_rate=0.5"], "flora takes the mean of the clients' updates as it is, got 0.5"),
    (["method=fedex_lora", "server.learning_rate=0.5"], "fedex_lora takes the mean"),
    (["method=fedex_lora", "server.rule=median"], "median compares whole uploads entry by entry"),
    (["server.rule=median", "adapter.rank=null", "federation.ranks={2:1,4:1}"], "median compares whole uploads"),
    (["method=ravan", "method.client_heads=2", "server.rule=krum"], "krum compares whole uploads"),
    (["method=centralized", "server.rule=median"], "centralized has one party"),
    (
        ["method=centralized", "federation.fraction=0.1", "training.local_epochs=1"],
        "an epoch of centralized covers all of the data, .*fraction=0.1 only its clients' part; use training.local_steps",
    ),
    (["engine=ray", "privacy=example", "privacy.noise=system"], "each process of engine=ray would have its own key"),
    (["server.rule=trimmed_mean", "federation.clients=9"], "0.1 of 9 clients rounds down to none"),
    (["server.rule=trimmed_mean", "federation.clients=25", "federation.fraction=0.2"], "0.1 of 5 clients"),
    (["server.rule=krum", "server.malicious=2", "federation.clients=6"], "needs 2 x malicious \\+ 3 clients in a round, got 2 of 6"),
    (["server.rule=krum", "server.malicious=2", "server.kept=6", "federation.clients=7"], "at most the 5 clients .* got 6"),
    (["training.scaffold=true"], "control variates are gradients of plain SGD"),
    (["training.scaffold=true", "training.optimizer=sgd", "training.momentum=0.9"], "plain SGD"),
    (["training.scaffold=true", *SGD, "training.weight_decay=0.1"], "plain SGD"),
    (["training.scaffold=true", *SGD, "training.proximal_mu=0.1"], "would hold FedProx's pull; leave out proximal_mu"),
    *(
        (["training.scaffold=true", *SGD, f"method={method}"], f"{method} has no common factors that mean the same")
        for method in ("flora", "fedsa_lora", "ravan", "centralized")
    ),
    (["training.scaffold=true", *SGD, "adapter.rank=null", "federation.ranks={2:1,4:1}"], "expected one rank and lasting bases"),
    (["training.scaffold=true", *SGD, "adapter.refresh_every=1"], "expected one rank and lasting bases"),
    (["compression.error_feedback=true"], "there is no error without compression"),
    (["method=centralized", "compression.name=int8"], "centralized sends nothing, got int8"),
    *(
        (["compression.name=top_k", "compression.error_feedback=true", *options], "redefines the factors every round")
        for options in (["method=flora"], ["adapter.refresh_every=1"], ["method=ravan", "method.client_heads=1"])
    ),
    (["method=fedit", "method.residual_rank=4"], "only fedex_lora sends a residual"),
    (["method.client_heads=1"], "only ravan has several heads, got method=fed_sb; leave it out"),
    (["method=ravan", "method.client_heads=5"], "expected at most method.heads=4, got 5; lower it"),
]


@pytest.fixture(scope="module")
def composed():
    """Yields `fedsim.cli.compose.compose` with Hydra initialised only once."""
    with initialized():
        yield lambda overrides: to_config(compose_with_hydra(overrides))


@pytest.mark.parametrize(("overrides", "reason"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_invalid_combinations_are_refused_with_the_reason(overrides, reason, composed):
    with pytest.raises(UserError, match=reason):
        effective(composed(overrides))


ACCEPTED = [
    ["method=fedit", "server.optimizer=fedyogi", "compression.name=int8"],
    ["adapter.refresh_every=1", "server.optimizer=fedadam"],
    ["server.rule=krum", "server.malicious=1", "federation.clients=5"],
    ["server.rule=trimmed_mean", "federation.clients=10"],
    ["method=full", "training.scaffold=true", *SGD, "compression.name=int4"],
    ["method=ravan", "method.client_heads=4", "compression.name=bfloat16", "adapter.rank=4"],
    ["method=fedsa_lora", "compression.name=top_k", "compression.error_feedback=true"],
    ["method=fedsvd", "server.learning_rate=0.5", "server.rule=median"],
    ["method=fedex_lora", "method.residual_rank=2", "compression.name=int8"],
]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_valid_combinations_are_accepted(overrides, composed):
    effective(composed(overrides))


@pytest.mark.parametrize(
    ("name", "sections", "exact"),
    [
        ("fed_sb", {}, True),
        ("flora", {"adapter": {"rank": None}, "federation": {"ranks": {2: 1.0, 3: 1.0}}}, True),
        ("fed_sb", {"adapter": {"rank": None}, "federation": {"ranks": {2: 1.0, 3: 1.0}}}, False),
        ("fed_sb", {"server": {"rule": ServerRule.median}}, False),
        ("fed_sb", {"server": {"optimizer": "fedadam"}}, False),
        ("fed_sb", {"server": {"learning_rate": 0.5}}, False),
        ("fedit", {}, False),
        ("fedex_lora", {}, True),
        ("fedex_lora", {"method": {"residual_rank": 2}}, False),
        ("fedsa_lora", {}, False),
        ("ravan", {}, True),
        ("ravan", {"method": {"client_heads": 2}}, True),
        ("ravan", {"method": {"client_heads": 1}}, False),
    ],
)
def test_an_average_counts_as_exact_only_if_the_round_takes_the_plain_mean(name, sections, exact):
    assert averages_exactly(of_method(name, **sections), METHODS[name]) == exact

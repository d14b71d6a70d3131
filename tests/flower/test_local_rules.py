"""Local rules besides plain SGD (FedProx, SCAFFOLD, some heads only), compared with a few lines in float64."""

from math import ceil

import pytest
import torch
from rounds import CLIENTS, RANK, RATE, Rounds, changed, of_method
from test_methods import Oracle, by_layer, lora_dense, lora_rule, ravan_dense, ravan_rule, sb_dense, sb_rule

from fedsim.choices import Schedule
from fedsim.config import EngineConfig
from fedsim.core.methods import METHODS

FORMS = {"fed_sb": ("BRA", "R", sb_dense, sb_rule), "fedit": ("BA", "BA", lora_dense, lora_rule)}
ROUNDS = {1: [0, 1], 2: [1, 2], 3: [0, 2]}
LINEAR = {"local_epochs": 1, "schedule": Schedule.linear, "learning_rate": RATE}  # clients take different numbers of steps


def descend(oracle, factors, form, client, round_, rates, direction):
    """Runs SGD from {layer: {kind: tensor}} with the step `direction(layer, kind, gradient, own tensor)`."""
    _, trained, dense, chain_rule = form
    mine = {layer: dict(own) for layer, own in factors.items()}
    for step, rate in enumerate(rates):
        gradients = oracle.gradients({layer: dense(own) for layer, own in mine.items()}, client, round_, step)
        for layer, gradient in gradients.items():
            by_kind = chain_rule(gradient, mine[layer])
            for kind in trained:
                mine[layer][kind] = mine[layer][kind] - rate * direction(layer, kind, by_kind[kind], mine[layer][kind])
    return mine


def linear_rates(run, client, round_, rounds):
    """Returns the round's rates of a linear schedule over the client's steps of all rounds, one epoch each."""
    steps = ceil(run.counts[client] / 3)
    return [RATE * (1 - ((round_ - 1) * steps + step) / (rounds * steps)) for step in range(steps)]


def weighted(shares, tensors):
    return sum(p * tensor for p, tensor in zip(shares, tensors, strict=True))


def assert_factors(run, factors, kinds):
    for layer, own in factors.items():
        for kind in kinds:
            torch.testing.assert_close(run.state.factors[f"{layer}.{kind}"].double(), own[kind], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", FORMS)
def test_fedprox_is_sgd_on_the_proximal_objective(name):
    mu = 0.2
    run = Rounds(of_method(name, training={"proximal_mu": mu, **LINEAR}))
    oracle, form = Oracle(run.session), FORMS[name]
    kinds, trained, *_ = form
    factors = by_layer(run.start, oracle.names, kinds)
    for round_ in (1, 2):
        start = factors

        def of_objective(layer, kind, gradient, own, start=start):
            return gradient + mu * (own - start[layer][kind])  # gradient of f(x) + mu/2 |x - start|^2

        clients = [
            descend(oracle, start, form, client, round_, linear_rates(run, client, round_, 2), of_objective) for client in range(CLIENTS)
        ]
        shares = run.shares(range(CLIENTS))
        factors = {
            layer: own | {kind: weighted(shares, [client[layer][kind] for client in clients]) for kind in trained}
            for layer, own in start.items()
        }
        run.next()
        assert_factors(run, factors, kinds)
    free = Rounds(of_method(name, training=LINEAR)).next(2)
    assert (free.flat(*trained) - run.flat(*trained)).abs().max() > 1e-3, "a pull that does not show would show nothing"


@pytest.mark.parametrize("name", FORMS)
def test_scaffold_matches_option_two_of_its_paper(name):
    run = Rounds(of_method(name, training={"scaffold": True, **LINEAR}, federation={"rounds": 4}))
    run.strategy.asking.participants = ROUNDS.get
    oracle, form = Oracle(run.session), FORMS[name]
    kinds, trained, *_ = form
    x = by_layer(run.start, oracle.names, kinds)
    zeros = {layer: {kind: torch.zeros_like(own[kind]) for kind in trained} for layer, own in x.items()}
    c, c_of = zeros, dict.fromkeys(range(CLIENTS), zeros)
    for round_, clients in ROUNDS.items():
        y, new_c = {}, {}
        for i in clients:
            rates = linear_rates(run, i, round_, 4)
            y[i] = descend(
                oracle, x, form, i, round_, rates, lambda layer, kind, g, own, c=c, c_i=c_of[i]: g - c_i[layer][kind] + c[layer][kind]
            )
            new_c[i] = {
                layer: {k: c_of[i][layer][k] - c[layer][k] + (x[layer][k] - y[i][layer][k]) / sum(rates) for k in trained} for layer in x
            }
        shares = run.shares(clients)
        x = {layer: own | {k: weighted(shares, [y[i][layer][k] for i in clients]) for k in trained} for layer, own in x.items()}
        c = {
            layer: {k: own[k] + sum(new_c[i][layer][k] - c_of[i][layer][k] for i in clients) / CLIENTS for k in trained}
            for layer, own in c.items()
        }
        c_of |= new_c
        run.next()
        assert_factors(run, x, kinds)
        flat = lambda own: torch.cat([own[layer][kind].flatten() for layer in own for kind in trained])  # noqa: E731
        assert flat(c).abs().max() > 1e-3, "control variates of nothing would show nothing"
        torch.testing.assert_close(run.state.control.double(), flat(c), rtol=0, atol=1e-5)
        for i in range(CLIENTS):
            kept = run.kept(i).get("control", torch.zeros(len(flat(c))))
            torch.testing.assert_close(kept.double(), flat(c_of[i]), rtol=0, atol=1e-5)


def test_control_variates_are_charged_to_participants_in_both_directions():
    run = Rounds(of_method("fed_sb", training={"scaffold": True}))
    run.strategy.asking.participants = ROUNDS.get
    run.next(3)
    count = run.spec.num_parameters(("R",))
    rows = [row for row in run.ledger.rows() if row["purpose"] == "control"]
    expected = {
        (round_, client, direction) for round_, clients in ROUNDS.items() for client in clients for direction in ("uplink", "downlink")
    }
    assert {(row["round"], row["client"], row["direction"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["parameters"] == count
        assert row["payload_bytes"] == row["raw_bytes"] == 4 * count < row["serialized_bytes"] < 4 * count + 1000


def heads_of(run, client, round_):
    """Returns the heads that the client sends in this round."""
    positions = run.session.sent_positions(round_, client)
    heads, counts = torch.unique(positions // RANK**2 % 2, return_counts=True)
    assert counts.tolist() == [len(run.spec.layers) * RANK**2] * len(heads), "heads are sent whole, in every layer"
    return heads.tolist()


def test_a_head_is_averaged_over_the_clients_that_trained_it():
    run = Rounds(of_method("ravan", method={"client_heads": 1}, federation={"rounds": 6}))
    oracle = Oracle(run.session)
    factors = by_layer(run.start, oracle.names, "BHsA")
    chosen_by_round = []
    for round_ in range(1, 4):
        chosen = [heads_of(run, client, round_) for client in range(CLIENTS)]
        assert all(len(heads) == 1 for heads in chosen)
        chosen_by_round.append(tuple(head for (head,) in chosen))
        uploads = []
        for client, (head,) in enumerate(chosen):
            only = lambda layer, kind, g, own, head=head: g * torch.eye(2)[head].view(-1, *[1] * (g.dim() - 1))  # noqa: E731
            mine = descend(oracle, factors, ("BHsA", "Hs", ravan_dense, ravan_rule), client, round_, [RATE] * 2, only)
            uploads.append({layer: mine[layer]["s"][head] * mine[layer]["H"][head] for layer in factors})
        for head in range(2):
            clients = [client for client in range(CLIENTS) if chosen[client] == [head]]
            for layer, own in factors.items():
                if clients:
                    own["H"] = own["H"].clone()
                    own["H"][head] = weighted(run.shares(clients), [uploads[client][layer] for client in clients])
        run.next()
        assert_factors(run, factors, "BHsA")
        for client in range(CLIENTS):
            assert run.moved(client=client, round=round_, direction="uplink") == 2 * RANK**2
            assert run.moved(client=client, round=round_, direction="downlink") == 2 * 2 * RANK**2
    assert len({head for heads in chosen_by_round for head in heads}) == 2
    assert len(set(chosen_by_round)) > 1, "the choice differs from round to round"


def test_a_head_that_nobody_trained_is_unchanged():
    run = Rounds(of_method("ravan", method={"client_heads": 1})).next()
    before = {name: tensor.clone() for name, tensor in run.state.factors.items()}
    run.strategy.asking.participants = {2: [0]}.get
    (head,) = heads_of(run, 0, 2)
    run.next()
    for layer in run.spec.layers:
        found, former = run.state.factors[f"{layer}.H"], before[f"{layer}.H"]
        assert torch.equal(found[1 - head], former[1 - head])
        assert not torch.equal(found[head], former[head])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fed_sb", {"training": {"scaffold": True, **LINEAR}}),
        ("fed_sb", {"training": {"proximal_mu": 0.1, **LINEAR}}),
        ("ravan", {"method": {"client_heads": 1}, "training": LINEAR}),
        ("fed_sb", {"adapter": {"rank": None}, "federation": {"ranks": {3: 1.0, 2: 1.0, 1: 1.0}}, "training": LINEAR}),
        ("fedsa_lora", {"training": LINEAR}),
    ],
)
def test_local_rules_do_not_depend_on_the_cohort_size(method, options):
    """With unequal numbers of steps, a cohort reorders its clients."""
    whole = of_method(method, **options)
    alone = changed(whole)
    alone.engine = EngineConfig(cohort_size=1)
    kinds = METHODS[method].uploaded(1)
    runs = [Rounds(config).next(2) for config in (whole, alone)]
    torch.testing.assert_close(runs[1].flat(*kinds), runs[0].flat(*kinds), rtol=1e-4, atol=1e-5)
    assert (runs[0].flat(*kinds) - runs[0].spec.pack(runs[0].start, kinds)).norm() > 1e-3

"""Clients of different ranks: nested LoRA-SB, FLoRA and FlexLoRA, against brute force with every client at its own rank."""

import csv
import json

import pytest
import torch
from rounds import CLIENTS, RANK, Rounds, of_method
from safetensors.torch import load_file
from test_methods import Oracle, best_of_rank, by_layer, exact_mean, lora_dense, lora_rule, sb_dense, sb_rule

from fedsim.checkpoints import load, saved
from fedsim.choices import Init, Residual
from fedsim.cli.compose import compose
from fedsim.core.collecting import Collected
from fedsim.core.initialization import lora
from fedsim.core.methods import METHODS
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.local_round import train_clients
from fedsim.seeding import derive_seed

RANKS = {3: 1.0, 2: 1.0, 1: 1.0}


def with_ranks(name, **sections):
    sections["adapter"] = {"rank": None, **sections.get("adapter", {})}
    return of_method(name, **{**sections, "federation": {"ranks": RANKS, **sections.get("federation", {})}})


def leading(factors, rank):
    """Returns the part of {layer: {B, A and perhaps R}} that a client of this rank holds."""
    cut = {"B": lambda B: B[:, :rank], "R": lambda R: R[:rank, :rank], "A": lambda A: A[:rank]}
    return {layer: {kind: cut[kind](tensor) for kind, tensor in own.items()} for layer, own in factors.items()}


def random_r(factors):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in factors.items():
        if name.endswith(".R"):
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))


def assert_agrees(found, expected):
    for name in expected:
        assert expected[name].abs().max() > 1e-4, "a change of nothing would show nothing"
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_three_clients_have_three_ranks():
    run = Rounds(with_ranks("fed_sb"))
    assert sorted(run.session.ranks) == [1, 2, 3]
    assert run.spec.rank == 3


@pytest.mark.parametrize("taking_part", [{1: [0, 1, 2], 2: [0, 1, 2]}, {1: [0, 2], 2: [0, 1]}])
def test_each_entry_of_nested_r_is_averaged_over_the_clients_that_trained_it(taking_part):
    run = Rounds(with_ranks("fed_sb"), random_r)
    run.strategy.asking.participants = taking_part.get
    oracle, ranks = Oracle(run.session), run.session.ranks
    assert ranks == [1, 3, 2]
    factors = by_layer(run.start, oracle.names, "BRA")
    for round_, clients in taking_part.items():
        trained = {c: oracle.train(leading(factors, ranks[c]), ("R",), sb_dense, sb_rule, c, round_) for c in clients}
        for layer, own in factors.items():
            for i in range(RANK):
                for j in range(RANK):
                    holders = [c for c in clients if ranks[c] > max(i, j)]
                    for p, c in zip(run.shares(holders), holders, strict=True):
                        own["R"][i, j] = p * trained[c][layer]["R"][i, j] + (own["R"][i, j] if c != holders[0] else 0.0)
        run.next()
        for layer, own in factors.items():
            found = run.state.factors[f"{layer}.R"]
            torch.testing.assert_close(found.double(), own["R"], rtol=0, atol=1e-5)
            if max(ranks[c] for c in clients) < RANK:
                assert torch.equal(found[2], run.start[f"{layer}.R"][2]), "what nobody trained stays bit for bit"
    assert_agrees(run.change(), {layer: sb_dense(own) for layer, own in factors.items()})


def test_a_client_of_smaller_rank_trains_as_lora_sb_of_that_rank_on_the_leading_bases():
    run = Rounds(with_ranks("fed_sb"), random_r)
    run.session.install_state(run.state)
    oracle = Oracle(run.session)
    factors = by_layer(run.start, oracle.names, "BRA")
    for client, rank in enumerate(run.session.ranks):
        (reply,) = train_clients(run.session, [client], 1, {})
        trained_alone = oracle.train(leading(factors, rank), ("R",), sb_dense, sb_rule, client, 1)
        expected = torch.cat([trained_alone[layer]["R"].flatten() for layer in factors])
        torch.testing.assert_close(reply.arrays["values"].double(), expected, rtol=0, atol=1e-5)
        whole = run.spec.layout(("R",)).unpack(reply.result.factors)
        for tensor in whole.values():
            assert not tensor[rank:].any()
            assert not tensor[:, rank:].any()


@pytest.mark.parametrize("residual", Residual)
def test_flora_stacks_factors_of_different_ranks(residual):
    run = Rounds(with_ranks("flora", method={"residual": residual})).next(2)
    oracle, ranks = Oracle(run.session), run.session.ranks
    folded = {layer: torch.zeros_like(weight) for layer, weight in oracle.base.items()}
    for round_ in (1, 2):
        fresh = by_layer(lora(run.spec, {}, derive_seed(0, "flora", round_)), oracle.names, "BA")
        clients = [
            oracle.train(leading(fresh, ranks[client]), "BA", lora_dense, lora_rule, client, round_, folded) for client in range(CLIENTS)
        ]
        exact = exact_mean(clients, run.shares(range(CLIENTS)), lora_dense)
        folded = {layer: folded[layer] + exact[layer] for layer in folded}
    assert_agrees(run.change(), folded)
    if residual is Residual.stacked:
        for layer in folded:
            assert run.state.increment[f"{layer}.U"].shape[1] == sum(ranks), "no column of zeros travels"


def test_flexlora_gives_each_client_the_leading_part_of_the_truncated_svd():
    run = Rounds(with_ranks("flexlora")).next(2)
    oracle, ranks = Oracle(run.session), run.session.ranks
    factors = by_layer(run.start, oracle.names, "BA")
    for round_ in (1, 2):
        clients = [oracle.train(leading(factors, ranks[client]), "BA", lora_dense, lora_rule, client, round_) for client in range(CLIENTS)]
        for layer, exact in exact_mean(clients, run.shares(range(CLIENTS)), lora_dense).items():
            factors[layer] = best_of_rank(exact)
    assert_agrees(run.change(), {layer: lora_dense(own) for layer, own in factors.items()})


def test_flexlora_factors_of_a_rank_deficient_mean_do_not_depend_on_rounding():
    spec = Rounds(with_ranks("flexlora")).spec
    generator = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(m, 1, generator=generator) @ torch.randn(1, n, generator=generator) for name, (m, n) in spec.layers.items()}

    def distributed(round_):
        noisy = {name: (dense.double() * (1 + 1e-8 * torch.randn(dense.shape))).float() for name, dense in exact.items()}
        return METHODS["flexlora"].finish(Collected(spec, {}, 0, round_, None, [1.0], noisy)).factors

    one, again, other = distributed(1), distributed(1), distributed(2)
    for name, dense in exact.items():
        torch.testing.assert_close(one[f"{name}.A"], again[f"{name}.A"], rtol=0, atol=1e-5)
        torch.testing.assert_close(one[f"{name}.A"] @ one[f"{name}.A"].T, torch.eye(RANK), rtol=0, atol=1e-5)
        torch.testing.assert_close(spec.update(one, name), dense, rtol=0, atol=1e-5)
        assert float((one[f"{name}.A"][1:] - other[f"{name}.A"][1:]).abs().max()) > 0.01, "fresh rows in every round"


def test_fed_sb_charges_a_client_its_squared_rank_and_its_part_of_the_bases():
    run = Rounds(with_ranks("fed_sb", adapter={"init": Init.gradient})).next(2)
    sides = sum(m + n for m, n in run.spec.layers.values())
    for client, rank in enumerate(run.session.ranks):
        for direction in ("uplink", "downlink"):
            assert run.moved(client=client, direction=direction, purpose="adapter", round=2) == 2 * rank**2
        assert run.moved(client=client, purpose="bases") == rank * sides
        uplinks = [row for row in run.ledger.rows() if row["client"] == client and row["direction"] == "uplink"]
        assert all(4 * rank**2 * 2 < row["serialized_bytes"] < 4 * rank**2 * 2 + 1000 for row in uplinks)


def test_flexlora_charges_a_client_the_factors_of_its_own_rank():
    run = Rounds(with_ranks("flexlora")).next(2)
    sides = sum(m + n for m, n in run.spec.layers.values())
    for client, rank in enumerate(run.session.ranks):
        for direction in ("uplink", "downlink"):
            assert run.moved(client=client, direction=direction, purpose="adapter", round=2) == rank * sides


def test_flora_charges_every_client_the_whole_stack_and_nothing_for_fresh_factors():
    run = Rounds(with_ranks("flora")).next(2)
    sides = sum(m + n for m, n in run.spec.layers.values())
    for client, rank in enumerate(run.session.ranks):
        assert run.moved(client=client, direction="uplink", round=2) == rank * sides
        assert run.moved(client=client, direction="downlink", round=1) == 0
        assert run.moved(client=client, direction="downlink", round=2, purpose="fold") == sum(run.session.ranks) * sides
        assert run.moved(client=client, direction="downlink", round=2, purpose="adapter") == 0


@pytest.mark.parametrize("method", ["fed_sb", "flora"])
def test_the_global_model_of_the_largest_rank_is_evaluated_and_exported(method, tmp_path):
    options = ["data.train_examples=24", "data.test_examples=4", "federation.clients=3", "federation.rounds=2", "training.local_steps=1"]
    options += [
        "adapter.rank=null",
        "evaluation.max_new_tokens=4",
        "federation.ranks={2:1,4:2}",
        "adapter.scaling=0.5",
        "adapter.target_modules=[layers.1.self_attn.q_proj,layers.2.mlp.down_proj]",
    ]
    summary = run(compose([f"method={method}", *options, "training.batch_size=2", f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert summary["rank"] == 4
    for task in summary["evaluation"].values():
        assert task["final"]["loss"] != task["base"]["loss"]
    exported = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    tensors = load(saved(tmp_path / "run/checkpoints")[-1]).tensors
    layer = "model.layers.1.self_attn.q_proj"
    product = exported[f"base_model.model.{layer}.lora_B.weight"] @ exported[f"base_model.model.{layer}.lora_A.weight"]
    own = {kind: tensors[f"factor/{layer}.{kind}"] for kind in "BRA" if f"factor/{layer}.{kind}" in tensors}
    dense = 0.5 * own["B"] @ own.get("R", torch.eye(4)) @ own["A"] + tensors.get(f"folded/{layer}", 0)
    assert config["r"] == config["lora_alpha"]
    torch.testing.assert_close(product, dense, rtol=0, atol=1e-6)
    rows = list(csv.DictReader((tmp_path / "run/communication.csv").read_text().splitlines()))
    sent = {row["client"]: int(row["parameters"]) for row in rows if (row["direction"], row["purpose"]) == ("uplink", "adapter")}
    assert len(set(sent.values())) == 2, "two ranks, two sizes"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.ranks])
def test_methods_that_would_mix_directions_refuse_ranks(method):
    with pytest.raises(UserError, match="which mixes directions of different ranks"):
        effective(compose([f"method={method}", "adapter.rank=null", "federation.ranks={2:1,4:1}"]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["federation.ranks={0:1,4:1}"], "expected ranks of at least 1"),
        (["federation.ranks={2:0,4:1}"], "positive shares"),
        (["federation.ranks={2:1,4:1}", "adapter.rank=8"], "expected the largest of federation.ranks, 4"),
    ],
)
def test_invalid_ranks_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        effective(compose(options))

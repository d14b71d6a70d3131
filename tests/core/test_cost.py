"""Costs predicted from shapes equal the ledger of a real run, transfer by transfer."""

import csv
import time
from dataclasses import replace

import pytest

from fedsim.cli.compose import compose
from fedsim.core.adapters import adapter_spec
from fedsim.core.communication import COLUMNS, Direction, Purpose
from fedsim.core.cost import Charge, charges, forecast
from fedsim.core.methods import METHODS
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.shapes import layer_shapes
from fedsim.training.evaluation import TaskResult

SMALL = (
    *("data.train_examples=20", "data.test_examples=1", "federation.clients=5", "federation.rounds=3", "training.batch_size=1"),
    *("training.local_steps=1", "adapter.rank=4", "adapter.init_samples=3", "method.heads=3", "evaluation.diagnosis=false"),
    "adapter.target_modules=[layers.1.self_attn.k_proj,layers.2.mlp.down_proj]",
)
MIXED = "adapter.rank=null federation.ranks={2:2,4:2,5:1}"
PARTIAL = "federation.fraction=0.4 federation.rounds=4"
FEEDBACK = "compression.name=top_k compression.density=0.1 compression.error_feedback=true"
SCAFFOLD = "training=sgd training.momentum=0 training.scaffold=true"
SECURE = "privacy.secure_aggregation=true"

RUNS = [
    *(f"method={name}" for name in METHODS),
    *(f"method={name} {PARTIAL}" for name in ("fed_sb", "rolora", "fedsvd", "fedex_lora")),
    *(f"method={name} {MIXED} {PARTIAL}" for name in ("fed_sb", "lora_xs", "flora", "flexlora")),
    *(f"method=fedex_lora {PARTIAL} method.{option}" for option in ("residual=dense", "residual_rank=3", "residual_rank=1000")),
    f"method=flora {PARTIAL} method.residual=dense",
    "method=ravan method.client_heads=2",
    *(f"adapter.refresh_every=1 adapter.init={init}" for init in ("gradient", "orthogonal", "weight_svd")),
    f"adapter.refresh_every=2 {PARTIAL}",
    "adapter.init=gradient_public",
    *(f"adapter.init=gradient adapter.sketch=true adapter.rank=3 {options}" for options in ("adapter.refresh_every=1", SECURE)),
    f"method=fedit {SCAFFOLD} {PARTIAL}",
    *(f"method=fedit compression.name={name}" for name in ("bfloat16", "int8", "int4")),
    f"method=ravan method.client_heads=1 compression.name=int4 {PARTIAL}",
    f"method=flora {MIXED} compression.name=int8",
    f"method=fedit {FEEDBACK}",
    f"{SCAFFOLD} {FEEDBACK} {PARTIAL}",
    f"privacy=example privacy.accountant=rdp privacy.noise_multiplier=1 privacy.init_noise_multiplier=1 adapter.init=gradient_dp {PARTIAL}",
    "privacy=example privacy.accountant=rdp privacy.noise_multiplier=1 privacy.init_noise_multiplier=1 adapter.init=gradient_dp "
    "adapter.sketch=true adapter.rank=3",
    f"privacy=client privacy.accountant=rdp privacy.noise_multiplier=1 method=fedit federation.weighting=uniform {PARTIAL}",
    *(f"federation.dropout={rate} method={name}" for rate, name in ((0.4, "flora"), (0.9, "fedex_lora"), (0.9, "flexlora"))),
    *(f"{SECURE} {options}" for options in ("method=fedit secure.bits=7", "federation.dropout=0.2", "adapter.refresh_every=1")),
    f"{SECURE} privacy=client privacy.noise_multiplier=1 method=fedit federation.weighting=uniform federation.fraction=0.6",
    f"federation.over_selection=0.5 {PARTIAL}",
    f"federation.over_selection=0.5 federation.dropout=0.5 {PARTIAL} method=flora",
    f"{SECURE} method=rolora federation.clients=7 federation.dropout=0.15 secure.neighbours=4 federation.rounds=6",
]


def composed(overrides):
    return compose([*SMALL, *overrides.split()])


def planned(config):
    """Returns the effective configuration, the method and the adapter's specification."""
    config = effective(config)
    method, layers = METHODS[config.method.name], layer_shapes(config.model, config.adapter.target_modules)
    return config, method, adapter_spec(layers, method.form, config.adapter.rank, config.method.heads, config.adapter.scaling)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a configuration, without evaluation and pictures, and returns the rows and totals of its ledger."""
    answers = TaskResult(accuracy=0.0, loss=0.0, num_examples=1)
    for module in ("server.evaluate", "worker.evaluate_examples"):
        monkeypatch.setattr(f"fedsim.flower.{module}", lambda *args, **options: answers)
    for picture in ("curves_png", "partition_png"):
        monkeypatch.setattr(f"fedsim.flower.results.{picture}", lambda *args: b"")

    def measure(config):
        summary = run(replace(config, run_dir=f"{tmp_path}/run"), quiet=True)
        rows = csv.DictReader((tmp_path / "run/communication.csv").read_text().splitlines())
        return [_charge(row) for row in rows], summary["communication"]

    return measure


def _charge(row):
    numbers = {name: int(row[name]) for name in Charge._fields if COLUMNS[name] == "q"}
    return Charge(direction=Direction[row["direction"]], purpose=Purpose[row["purpose"]], **numbers)


def ordered(found):
    return sorted(found, key=lambda charge: (*charge[:2], charge.direction.name, charge.purpose.name, *charge[4:]))


@pytest.mark.parametrize("overrides", RUNS)
def test_predicted_transfers_and_totals_equal_those_of_the_ledger(measured, overrides):
    config = composed(overrides)
    rows, totals = measured(config)
    assert ordered(charges(*planned(config))) == ordered(rows)
    assert bool(rows) == (overrides != "method=centralized")
    found = forecast(*planned(config)).totals
    assert found == {name: totals[name] for name in found}


def steady(overrides):
    """Parameters that a client, on average, trains, sends and receives in a middle round, and those of its set-up."""
    found = forecast(*planned(composed(overrides)))
    return found.trained, found.up.parameters, found.down.parameters, found.bases, found.gradient


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("method=fed_sb", lambda r, m, n, d: (r * r, r * r, r * r, r * (m + n), d)),
        ("method=fed_sb adapter.init=gradient_public", lambda r, m, n, d: (r * r, r * r, r * r, r * (m + n), 0)),
        ("method=fed_sb adapter.refresh_every=2", lambda r, m, n, d: (r * r, r * r, 1.5 * r * r, 2 * r * (m + n), 2 * d)),
        ("method=lora_xs", lambda r, m, n, d: (r * r, r * r, r * r, 0, 0)),
        ("method=fedit", lambda r, m, n, d: (r * (m + n), r * (m + n), r * (m + n), 0, 0)),
        ("method=ffa_lora", lambda r, m, n, d: (r * m, r * m, r * m, 0, 0)),
        ("method=fedsa_lora", lambda r, m, n, d: (r * (m + n), r * n, r * n, 0, 0)),
        ("method=fedsvd", lambda r, m, n, d: (r * m, r * m, r * (m + n), 0, 0)),
        ("method=rolora", lambda r, m, n, d: 3 * (r * (m + n) / 2,) + (0, 0)),
        ("method=flora", lambda r, m, n, d: (r * (m + n), r * (m + n), 5 * r * (m + n), 0, 0)),
        ("method=fedex_lora", lambda r, m, n, d: (r * (m + n), r * (m + n), 6 * r * (m + n), 0, 0)),
        ("method=fedex_lora method.residual=dense", lambda r, m, n, d: (r * (m + n), r * (m + n), r * (m + n) + d, 0, 0)),
        ("method=fedex_lora method.residual_rank=1", lambda r, m, n, d: (r * (m + n), r * (m + n), (r + 1) * (m + n), 0, 0)),
        ("method=ravan", lambda r, m, n, d: (3 * r * r + 3, 3 * r * r, 3 * r * r, 0, 0)),
        ("method=ravan method.client_heads=1", lambda r, m, n, d: (r * r + 1, r * r, 3 * r * r, 0, 0)),
        ("method=full", lambda r, m, n, d: (d, d, d, 0, 0)),
        (f"method=fedit {SCAFFOLD}", lambda r, m, n, d: (r * (m + n), 2 * r * (m + n), 2 * r * (m + n), 0, 0)),
        ("method=flora federation.fraction=0.4", lambda r, m, n, d: (r * (m + n), r * (m + n), 2 * r * (m + n), 0, 0)),
        ("method=centralized", lambda r, m, n, d: (r * r, 0, 0, 0, 0)),
    ],
)
def test_a_middle_round_costs_what_the_papers_say(overrides, expected):
    layers = planned(composed(overrides))[2].layers.values()
    assert steady(overrides) == tuple(map(sum, zip(*(expected(4, m, n, m * n) for m, n in layers), strict=True)))


def test_clients_of_different_ranks_are_reported_by_their_mean():
    by_rank = {rank: steady(f"method=flexlora adapter.rank={rank}") for rank in (2, 4, 5)}
    mean = tuple(0.4 * two + 0.4 * four + 0.2 * five for two, four, five in zip(*by_rank.values(), strict=True))
    assert steady(f"method=flexlora {MIXED}") == pytest.approx(mean)


def test_compression_shrinks_only_the_upload():
    plain, small = (forecast(*planned(composed(f"method=fedit {more}"))) for more in ("", "compression.name=bfloat16"))
    assert small.up == (plain.up.parameters, plain.up.payload_bytes / 2)
    assert (small.down, small.trained, small.bases) == (plain.down, plain.trained, plain.bases)


def test_an_upload_too_large_for_a_codec_raises_a_user_error():
    config = composed("method=full model=mistral_7b adapter.target_modules=[] compression.name=int8")
    with pytest.raises(UserError, match=r"compression.name=int8: Expected a number of parameters from 1 to 2.*6979321856"):
        list(charges(*planned(config)))


def test_the_cost_of_an_asynchronous_run_is_not_predicted():
    with pytest.raises(UserError, match="only a run has"):
        list(charges(*planned(composed("federation.network=mobile federation.mode=fedbuff"))))


def test_the_forecast_for_billions_of_parameters_takes_under_a_second():
    config = composed(
        "method=flora model=mistral_7b adapter.target_modules=[] adapter.rank=32 federation.clients=25 data.train_examples=100"
    )
    parts = planned(config)
    began = time.perf_counter()
    assert forecast(*parts).down.parameters == 25 * 83_886_080
    assert time.perf_counter() - began < 1

"""Whole private runs: reported epsilon, withheld values, stops at the budget, and refused configurations."""

import json
from functools import cache
from math import isfinite, log

import pytest
import torch
from conftest import unreachable_entries

from clients.app import app
from fedsim.cli.compose import compose
from fedsim.core.communication import CommunicationLedger
from fedsim.core.participation import drawn
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower.aggregation import Aggregation
from fedsim.flower.facts import RoundFacts
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.reading import Upload
from fedsim.flower.strategy import FedsimStrategy
from fedsim.local_round import clipped_update, train_clients
from fedsim.privacy.accounting import epsilon
from fedsim.seeding import NoiseKey
from fedsim.session import open_session

SMALL = (
    *("data.train_examples=60", "data.test_examples=4", "federation.clients=3", "federation.rounds=2", "training.batch_size=4"),
    *("training.local_steps=2", "adapter.rank=4", "adapter.init_samples=30", "evaluation.max_new_tokens=2", "privacy.accountant=rdp"),
    "evaluation.diagnosis=false",
)
CLIENT = ("privacy=client", "adapter.init=orthogonal")


def run_in(folder, *overrides):
    return run(compose([*SMALL, f"run_dir={folder}", *overrides]), quiet=True)


def events_of(folder, kind):
    return [event for line in (folder / "events.jsonl").read_text().splitlines() if (event := json.loads(line))["kind"] == kind]


def oracle_epsilon(mechanisms, delta):
    """Returns epsilon by the privacy loss distributions of dp-accounting, which shares no code with Opacus."""
    return _oracle(json.dumps(mechanisms), delta)


@cache  # clients with equal amounts of data share the result
def _oracle(mechanisms, delta):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    for each in json.loads(mechanisms):
        gaussian = dp_accounting.GaussianDpEvent(each["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(each["sampling_rate"], gaussian), each["steps"])
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("init", ["weight_svd", "gradient_dp"])
def test_reported_epsilon_covers_initialisation_and_training_of_every_client(tmp_path, init):
    privacy = run_in(tmp_path / "run", "privacy=example", "privacy.epsilon=6", "privacy.accountant=prv", f"adapter.init={init}")["privacy"]
    assert (privacy["unit"], privacy["accountant"], len(privacy["per_client"])) == ("example", "prv", 3)
    for client in privacy["per_client"]:
        names = [each["name"] for each in client["mechanisms"]]
        assert names == (["initialization", "training"] if init == "gradient_dp" else ["training"])
        assert client["mechanisms"][-1]["sampling_rate"] == pytest.approx(4 / 20)
        assert client["mechanisms"][-1]["steps"] == 2 * 2
        assert client["epsilon"] == pytest.approx(oracle_epsilon(client["mechanisms"], client["delta"]), rel=0.01)
        assert 0.995 * 6 < client["epsilon"] <= 6
    assert (privacy["initialization_epsilon"] > 0) == (init == "gradient_dp")
    assert privacy["delta"] == pytest.approx(20**-1.1)


def test_a_private_run_withholds_losses_and_token_counts_and_plots_its_epsilon(tmp_path):
    summary = run_in(tmp_path / "run", "privacy=example", "privacy.noise_multiplier=1.0", "privacy.epsilon=null")
    rounds = events_of(tmp_path / "run", "round")
    assert all(event["train_loss"] is None and event["tokens"] == 0 for event in rounds)
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"] == pytest.approx(summary["privacy"]["epsilon"])
    assert (tmp_path / "run/privacy.png").stat().st_size > 1000


def test_a_run_stops_before_exceeding_its_budget_and_keeps_its_checkpoint(tmp_path):
    one = run_in(tmp_path / "one", "privacy=example", "privacy.noise_multiplier=0.8", "privacy.epsilon=null", "federation.rounds=1")
    budget = one["privacy"]["epsilon"] * 1.01
    with pytest.raises(UserError, match=r"round 2 would exceed the budget"):
        run_in(tmp_path / "two", "privacy=example", "privacy.noise_multiplier=0.8", f"privacy.epsilon={budget}")
    assert [event["round"] for event in events_of(tmp_path / "two", "round")] == [1]
    assert list((tmp_path / "two/checkpoints").glob("round_0001*"))


def test_clients_whose_budget_an_initial_gradient_would_exceed_are_not_asked(tmp_path):
    options = ("privacy=example", "privacy.noise_multiplier=1", "privacy.init_noise_multiplier=0.3", "adapter.init=gradient_dp")
    with pytest.raises(
        UserError, match=r"privacy.epsilon: initial gradients at the beginning would exceed the budget of 1 of every client"
    ):
        run_in(tmp_path / "none", *options, "privacy.epsilon=1")
    uneven = ("federation.quantity_sigma=1.2", "adapter.refresh_every=1", "privacy.delta=1e-3")
    free = run_in(tmp_path / "free", *options, *uneven, "privacy.epsilon=1e6")
    spent = sorted(client["epsilon"] for client in free["privacy"]["per_client"])
    budget = (spent[0] + spent[-1]) / 2
    found = run_in(tmp_path / "some", *options, *uneven, f"privacy.epsilon={budget}")["privacy"]
    assert spent[0] < budget, "otherwise all would stop at once"
    assert max(client["epsilon"] for client in found["per_client"]) <= budget


def test_rounds_without_drawn_clients_run_and_cost_the_same(tmp_path):
    options = (*CLIENT, "privacy.noise_multiplier=1.0", "privacy.epsilon=null", "federation.fraction=0.2", "federation.rounds=6")
    summary = run_in(tmp_path / "run", *options)
    clients = [event["clients"] for event in events_of(tmp_path / "run", "round")]
    assert clients == [drawn(compose([*SMALL, *options]), number) for number in range(1, 7)]
    assert [] in clients
    assert any(clients)
    assert {client["mechanisms"][0]["steps"] for client in summary["privacy"]["per_client"]} == {6}


def test_the_budget_also_stops_a_round_without_drawn_clients(tmp_path):
    options = (*CLIENT, "privacy.noise_multiplier=1.0", "federation.fraction=0.2", "federation.rounds=6", "privacy.delta=1e-3")
    spent = run_in(tmp_path / "free", *options, "privacy.epsilon=null")
    empty = next(event["round"] for event in events_of(tmp_path / "free", "round") if event["round"] > 1 and not event["clients"])
    before = run_in(tmp_path / "before", *options, "privacy.epsilon=null", f"federation.rounds={empty - 1}")["privacy"]["epsilon"]
    assert before < spent["privacy"]["epsilon"]
    with pytest.raises(UserError, match=rf"round {empty} would exceed the budget"):
        run_in(tmp_path / "run", *options, f"privacy.epsilon={before * 1.001}")


def test_a_resumed_run_reports_the_privacy_and_adapter_of_an_uninterrupted_one(tmp_path):
    options = ("privacy=example", "privacy.noise_multiplier=1.0", "privacy.epsilon=null", "adapter.init=orthogonal")
    whole = run_in(tmp_path / "whole", *options)
    folder = tmp_path / "part"
    run_in(folder, *options)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").glob("round_0002*"):
        path.unlink()
    resumed = run_in(folder, *options, "resume=true")
    assert resumed["privacy"] == whole["privacy"]
    assert resumed["adapter_digest"] == whole["adapter_digest"]


def test_client_level_privacy_withholds_diagnosis_of_raw_uploads(tmp_path):
    """Distances between clients would be reported without noise, the same at noise 1 and at noise 1,000."""
    run_in(tmp_path / "run", *CLIENT, "privacy.noise_multiplier=1000", "privacy.epsilon=null", "evaluation.diagnosis=true")
    for event in events_of(tmp_path / "run", "round"):
        assert not {"drift", "deviation", "effective_rank"} & event.keys()
    assert not (tmp_path / "run/diagnosis.png").exists()
    run_in(tmp_path / "open", "adapter.init=orthogonal", "evaluation.diagnosis=true")
    assert all(event["drift"] > 0 for event in events_of(tmp_path / "open", "round")), "otherwise the test above would tell nothing"


@pytest.mark.parametrize("unit", ["example", "client"])
def test_secret_key_noise_repeats_only_in_a_resumed_run_and_the_key_is_deleted_at_the_end(unit, tmp_path, monkeypatch):
    options = (f"privacy={unit}", "privacy.noise_multiplier=1.0", "privacy.epsilon=null", "adapter.init=orthogonal", "privacy.noise=system")
    key = tmp_path / "whole/noise.key"
    with monkeypatch.context() as stopping:
        stopping.setattr("fedsim.flower.server.write_results", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / "whole", *options)
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text() not in (tmp_path / "whole/events.jsonl").read_text()
    *_, last = events_of(tmp_path / "whole", "round")
    for path in (tmp_path / "whole/checkpoints").glob("round_0002*"):
        path.unlink()
    whole = run_in(tmp_path / "whole", *options, "resume=true")["adapter_digest"]
    assert whole == last["adapter_digest"]
    assert not key.exists(), "with which the noise could be taken off"
    assert run_in(tmp_path / "other", *options)["adapter_digest"] != whole
    assert run_in(tmp_path / "seeded", *options[:-1])["adapter_digest"] != whole
    assert not (tmp_path / "seeded/noise.key").exists()


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("secure", ["true", "false"])
def test_a_diverged_client_is_not_reported_under_client_level_privacy(secure, tmp_path):
    options = ("privacy.noise_multiplier=1.0", "privacy.epsilon=null", f"privacy.secure_aggregation={secure}", "federation.rounds=1")
    run_in(tmp_path / "run", *CLIENT, *options, "training.optimizer=sgd", "training.learning_rate=1e30")
    (event,) = events_of(tmp_path / "run", "round")
    assert (event["clients"], event["missing"]) == ([0, 1, 2], [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1.0])
def test_no_update_is_longer_than_the_clip_norm(bad):
    update, within = clipped_update(torch.cat([torch.tensor([bad, 1.0]), torch.full((10_000_000,), 0.7)]), 0.5)
    assert float(update.double().norm()) <= 0.5 * (1 + 1e-6)
    assert bool(update.any()) == isfinite(bad)
    assert not within
    assert clipped_update(torch.tensor([0.3, 0.4]), 0.5 + 1e-6)[1]


def test_private_participants_are_drawn_from_the_noise_key_and_not_from_the_seed():
    config = compose([*SMALL, *CLIENT, "privacy.noise_multiplier=1.0", "privacy.epsilon=null", "federation.fraction=0.5"])
    session = open_session(config)
    session.noise_key = key = NoiseKey.secret()
    strategy = FedsimStrategy(session, config, CommunicationLedger(), session.initial_state(session.derived_factors(1)))
    participants = [strategy.participants(number) for number in range(1, 31)]
    assert participants == [drawn(config, number, key) for number in range(1, 31)]
    assert participants != [drawn(config, number) for number in range(1, 31)]
    assert 20 < sum(map(len, participants)) < 70, "each of three clients in half of the rounds"


def server_step(noise, *overrides, clip=0.05):
    """Returns the mean of a round's clipped updates, the server's step, its state, and the unclipped updates."""
    config = compose(
        [*SMALL, *CLIENT, f"privacy.clip_norm={clip}", f"privacy.noise_multiplier={noise}", "privacy.epsilon=null", *overrides]
    )
    session = open_session(config)
    state = session.initial_state(session.derived_factors(1))
    session.install_state(state)
    start = session.spec.pack(state.factors, ("R",))
    without = open_session(effective(compose([*SMALL, "adapter.init=orthogonal"])))
    without.install_state(without.initial_state(without.derived_factors(1)))
    updates = [train_clients(without, [client], 1, {})[0].arrays["values"] - start for client in range(3)]
    clipped = [update * min(1.0, clip / float(update.norm())) for update in updates]
    session = open_session(config)
    state = session.initial_state(session.derived_factors(1))
    FedsimStrategy(session, config, CommunicationLedger(), state).exchange(1, InProcessGrid(app))
    return sum(clipped) / 3, session.spec.pack(state.factors, ("R",)) - start, state, updates


def test_client_level_privacy_averages_clipped_updates_with_equal_weights():
    mean, found, _, updates = server_step(0.0)
    assert all(float(update.norm()) > 0.05 for update in updates), "nothing would be clipped"
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


def test_the_servers_noise_has_the_configured_standard_deviation():
    def sigma(noise):
        return float((server_step(noise)[1] - mean).std()) * 3 / 0.05

    mean = server_step(0.0)[0]
    assert sigma(1.2) == pytest.approx(1.2, rel=0.15)
    for factor in (2 / 3, 3 / 2):
        assert sigma(1.2 * factor) != pytest.approx(1.2, rel=0.15)


def test_an_adaptive_clip_norm_moves_towards_the_quantile():
    small, large = (
        server_step(0.01, "privacy.adaptive_clip=true", "privacy.clip_rate=0.5", clip=clip)[2].clip_norm / clip for clip in (1e-4, 100.0)
    )
    assert small > 1.2  # every update is longer, so the clip norm grows
    assert large < 0.85  # every update is shorter, so the clip norm falls


def aggregation_of(noise, *overrides, number=1):
    """Returns a round before any upload (four clients, two expected), its state and its start."""
    half = ("federation.clients=4", "federation.fraction=0.5", "privacy.clip_norm=0.1", f"privacy.noise_multiplier={noise}")
    session = open_session(effective(compose([*SMALL, *CLIENT, *half, "privacy.epsilon=null", *overrides])))
    state = session.initial_state(session.derived_factors(1))
    return Aggregation(session, state, number, RoundFacts()), state, state.flat(session.method.uploaded(number))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_sum_is_divided_by_the_expected_number_of_clients(count):
    aggregation, state, start = aggregation_of(0.0)
    update = torch.linspace(-1, 1, len(start)) / len(start)
    for client in range(count):
        aggregation.add(Upload(client, 10, 0, 0.0, True, start + update))
    aggregation.finish()
    torch.testing.assert_close(aggregation._session.spec.pack(state.factors, ("R",)) - start, update * count / 2, rtol=1e-4, atol=1e-7)


def test_one_client_among_thousands_changes_the_sum_by_the_clip_norm_at_most():
    """A float32 mean has rounding errors in proportion to the start, and a sum made from it multiplies them by the count."""

    def sum_of(count):
        aggregation, state, start = aggregation_of(0.0, "method=fedit", "adapter.init=lora", "privacy.clip_norm=1e-3")
        update = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
        for client in range(count):
            aggregation.add(Upload(client, 10, 0, 0.0, True, start + 0.999e-3 * update.roll(client) / update.norm()))
        aggregation.finish()
        return 2 * (state.flat(("B", "A")) - start)

    assert float((sum_of(4000) - sum_of(3999)).norm()) < 1.01e-3


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_bits_of_the_new_factors_do_not_reveal_the_sum(count):
    aggregation, state, start = aggregation_of(1.0, "adapter.rank=32")
    assert not start.any()
    updates = 0.1 * torch.nn.functional.normalize(torch.randn(2, len(start), generator=torch.Generator().manual_seed(1)))
    for client in range(count):
        aggregation.add(Upload(client, 10, 0, 0.0, True, updates[client]))
    aggregation.finish()
    sums = updates[0], updates[0] + updates[1]
    true, false = (unreachable_entries(2 * state.flat(("R",)), each) for each in (sums[count - 1], sums[2 - count]))
    assert min(true, false) > 100, "with noise of float32 none of the true sum"


def test_a_round_without_drawn_clients_is_noise_over_the_expected_number():
    def sigma(noise):
        aggregation, state, start = aggregation_of(noise)
        aggregation.finish()
        return float((aggregation._session.spec.pack(state.factors, ("R",)) - start).std()) * 2 / 0.1

    assert sigma(1.2) == pytest.approx(1.2, rel=0.15)
    for factor in (2 / 3, 3 / 2):
        assert sigma(1.2 * factor) != pytest.approx(1.2, rel=0.15)


def test_the_count_behind_an_adaptive_clip_norm_has_the_configured_noise():
    """In a round without clients the count is pure noise over the two expected clients."""
    aggregation, state, start = aggregation_of(1.2, "privacy.adaptive_clip=true", "privacy.clip_rate=0.5", "privacy.clip_quantile=0.5")
    counts = []
    for number in range(1, 401):
        state.clip_norm, aggregation._round = 0.1, number
        aggregation._noised(start)
        counts.append(-2 * log(state.clip_norm / 0.1) / 0.5)
    sigma = torch.tensor(counts).std().item()
    assert sigma == pytest.approx(1.2, rel=0.15)
    for factor in (2 / 3, 3 / 2):
        assert sigma != pytest.approx(1.2 * factor, rel=0.15)


REFUSED = [
    (("privacy=example", "adapter.init=gradient"), "without noise, which no epsilon covers; choose one of gradient_dp, gradient_public"),
    (("adapter.init=gradient_dp",), "its noise belongs to a privacy budget"),
    (("privacy.unit=example",), "expected privacy.epsilon or privacy.noise_multiplier"),
    (("privacy.epsilon=3",), "privacy.epsilon=3 has no effect alone: add privacy=example"),
    (("privacy.noise_multiplier=1",), "privacy.noise_multiplier=1 has no effect alone"),
    (("privacy.delta=1e-5",), "privacy.delta=1e-05 has no effect alone"),
    (("privacy=client", "federation.weighting=examples"), "set federation.weighting=uniform"),
    (("privacy=client", "method=flora"), "a mean of updates, which flora does not form"),
    (("privacy=client", "server.rule=median"), "a plain mean"),
    (("privacy=client", "adapter.init=gradient_dp"), "undefined cost with unit=client"),
    (("privacy=client", "method=fedsa_lora"), "fedsa_lora leaves factors at the clients that no noise covers"),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSED)
def test_options_that_would_void_the_guarantee_are_refused_with_the_reason(overrides, reason):
    with pytest.raises(UserError) as refused:
        effective(compose([*SMALL, *overrides]))
    assert reason in str(refused.value)


def test_a_delta_of_one_over_n_is_refused():
    config = compose([*SMALL, "privacy=example", f"privacy.delta={1 / 20}"])
    with pytest.raises(UserError, match=r"Expected 0 < delta < 1/n"):
        _ = open_session(config).privacy_plan


def test_bases_from_unprotected_gradients_report_no_epsilon(tmp_path):
    summary = run_in(tmp_path / "run", "privacy=example", "adapter.init=gradient", "privacy.unsafe_init=true")
    assert summary["privacy"]["epsilon"] in (None, float("inf"))
    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert written["privacy"]["epsilon"] is None


def test_unsafe_init_does_not_change_the_plan_when_bases_are_private():
    options = [*SMALL, "privacy=example", "privacy.epsilon=3", "adapter.init=gradient_dp", "privacy.accountant=rdp"]
    plain, flagged = (open_session(compose([*options, *more])).privacy_plan[0] for more in ((), ("privacy.unsafe_init=true",)))
    assert flagged == plain
    assert epsilon(flagged.mechanisms, flagged.delta, "rdp") <= 3


@pytest.mark.parametrize("method", ["fedit", "flora", "ravan", "centralized"])
def test_methods_train_within_the_default_privacy_budget(tmp_path, method):
    summary = run_in(tmp_path / "run", "privacy=example", f"method={method}", "adapter.rank=4", "federation.rounds=1")
    assert 0 < summary["privacy"]["epsilon"] <= 8


def test_a_private_configuration_defaults_to_weight_svd_bases():
    config = effective(compose([*SMALL, "privacy=example"]))
    assert config.adapter.init is not None
    assert config.adapter.init.name == "weight_svd"

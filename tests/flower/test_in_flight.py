"""Privacy charges cover every upload requested before a deployment's server died, whatever the resumed run requests."""

import json
from dataclasses import replace

import pytest
from rounds import CLIENTS, of_method

from clients.desk import Desk
from clients.owner import Owner
from fedsim.choices import Accountant, Init, PrivacyUnit
from fedsim.config import EvaluationConfig
from fedsim.flower.grid import InProcessGrid
from fedsim.flower.in_flight import InFlight, charge_line
from fedsim.flower.roster import Roster
from fedsim.flower.server import serve
from fedsim.privacy.accounting import Mechanism
from fedsim.privacy.ledger import PrivacyLedger

ROUND, OTHER = Mechanism(1.0, 0.1, 4), Mechanism(1.0, 0.2, 4)


def lines(number, mechanisms, digest="a"):
    return [{"kind": "asked", "round": number}, {"kind": "charged", **charge_line("training", number, digest, mechanisms)}]


def test_all_requests_are_charged_and_only_a_repeat_of_the_last_one_is_covered():
    asked = [*lines(2, {0: ROUND}), *lines(3, {0: ROUND, 1: ROUND, 2: OTHER}), *lines(3, {1: OTHER}, "b")]
    in_flight, ledger = InFlight(json.loads(json.dumps(asked))), PrivacyLedger("example", dict.fromkeys(range(3), 1e-3))
    charged_lines = in_flight.charge(ledger)
    assert ledger.history(0) == (replace(ROUND, steps=8),), "two rounds"
    assert ledger.history(1) == (ROUND, OTHER)
    assert ledger.history(2) == (OTHER,)
    again = PrivacyLedger("example", dict.fromkeys(range(3), 1e-3))
    InFlight([*asked, *({"kind": "charged", **line} for line in charged_lines)]).charge(again)
    assert again.to_json() == ledger.to_json(), "lines that repeat what was said are not said twice"
    assert in_flight.covers("training", 3, "a", 0, ROUND)
    assert not in_flight.covers("training", 3, "a", 1, ROUND), "the answer to that is not kept any more"
    assert not in_flight.covers("training", 2, "a", 0, ROUND)
    for other in (("initial gradient", 3, "a", 0, ROUND), ("training", 4, "a", 0, ROUND), ("training", 3, "c", 0, ROUND)):
        assert not in_flight.covers(*other)
    assert not in_flight.covers("training", 3, "a", 0, OTHER)
    assert in_flight.concerns("training", 3)
    assert not in_flight.concerns("training", 4)


def rows(folder, count):
    texts = [{"question": f"What is {n} plus 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(count)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, texts)))


class Deployment:
    """A server and desks; client 1 has its own rows. The server dies before it receives the reply `dies_at`: (type, round, node)."""

    def __init__(self, folder, **sections):
        self.folder, self.dies_at = folder, None
        private = {"unit": PrivacyUnit.example, "noise_multiplier": 1.0, "accountant": Accountant.rdp, **sections.pop("privacy", {})}
        config = of_method("fed_sb", privacy=private, data={"train_examples": 24, "test_examples": 2}, **sections)
        self.config = replace(config, run_dir=str(folder / "run"), evaluation=EvaluationConfig(max_new_tokens=1))

    def run(self, **options):
        own = {"shard": False, "data_path": str(self.folder / "mine.jsonl"), "data_sets": ["gsm8k"]}
        owners = [
            Owner(client, folder=str(self.folder / str(client)), **(own if client == 1 else {"shard": True})) for client in range(CLIENTS)
        ]
        desks = [Desk(owner) for owner in owners]

        def handle(message, context):
            reply = desks[context.node_id - 1].answer(message)
            if (message.metadata.message_type, message.metadata.group_id, context.node_id) == self.dies_at:
                raise KeyboardInterrupt
            return reply

        grid = InProcessGrid(handle, workers=CLIENTS)
        config = replace(self.config, **options)
        summary = serve(grid, config, grid.contexts, roster=Roster(grid, config), quiet=True)
        self.own = [desk._budget._ledger.history(client) for client, desk in enumerate(desks)]
        return [each["mechanisms"] for each in summary["privacy"]["per_client"]]


@pytest.mark.parametrize(
    ("dies_at", "init"), [(("train", "2", 3), Init.orthogonal), (("train.initial_gradient", "0", 3), Init.gradient_dp)]
)
@pytest.mark.parametrize("after", [20, 30])
def test_a_resumed_deployment_charges_replies_lost_with_its_server(dies_at, init, after, tmp_path):
    rows(tmp_path, 20)
    deployment = Deployment(
        tmp_path, adapter={"init": init, "init_samples": 9}, privacy={"init_noise_multiplier": 1.0} if init is Init.gradient_dp else {}
    )
    deployment.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        deployment.run()
    rows(tmp_path, after)
    deployment.dies_at = None
    mechanisms_by_client = deployment.run(resume=True)
    steps = {client: sum(each["steps"] for each in mechanisms) for client, mechanisms in enumerate(mechanisms_by_client)}
    once = 2 * 2 + (init is Init.gradient_dp)
    again = 1 if init is Init.gradient_dp else 2
    if after == 20:
        assert steps == dict.fromkeys(range(3), once), "the same request is answered with the same noise"
        assert sum(mechanism.steps for mechanism in deployment.own[1]) == once
        journal = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
        (start,) = [place for place, line in enumerate(journal) if line["kind"] == "resumed"]
        valid_lines = journal[: journal[start]["goes_on_from"]] + journal[start:]
        charged = [each for line in valid_lines if line["kind"] == "charged" for each in line["mechanisms"] if 1 in each["clients"]]
        assert sum(each["steps"] for each in charged) == once, "the audit log adds up to the same"
    else:
        rates = {
            each["sampling_rate"] for each in mechanisms_by_client[1] if each["name"] == ("training" if again == 2 else "initialization")
        }
        assert len(rates) == 2, "those of 18 and of 27 examples"
        assert steps[1] == once + again
        assert sum(mechanism.steps for mechanism in deployment.own[1]) == steps[1], "as the client's own accountant has it"

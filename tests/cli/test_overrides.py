import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.cli.compose import compose
from fedsim.cli.overrides import parse, quote, swept
from fedsim.errors import UserError

MISTAKES = {
    "federaton.clients=3": "Did you mean 'federation.clients'?",
    "clients=3": "Did you mean 'federation.clients'?",
    "federation.cleints=3": "federation has clients, rounds, fraction",
    "seeed=3": "Did you mean 'seed'?",
    "method=fedsb": "Unknown method 'fedsb': expected one of centralized, fed_sb, .* Did you mean 'fed_sb'?",
    "experiment=dmo": "Did you mean 'demo'?",
    "hydra/launcher=joblb": "expected one of basic, joblib. Did you mean 'joblib'?",
    "hydra/sweeper=other": "Unknown option 'hydra/sweeper'",
    "hydra.sweep.dir=x": "Expected run_dir",
    "federation.clients=abc": r"Expected federation.clients \(integer >= 1 and <= 1,000,000\), got 'abc'",
    "federation.clients=2.5": r"\(integer >= 1 and <= 1,000,000\), got '2.5'",
    "federation.clients=null": "got 'null'",
    "seed=true": r"Expected seed \(integer >= 0\), got 'true'",
    "resume=maybe": r"\(true or false\), got 'maybe'",
    "training.optimizer=adam": r"\(one of adamw, sgd\), got 'adam'. Did you mean 'adamw'?",
    "method.name=fedsb": "one of centralized, fed_sb",
    "data.train=gsm8k": r"\(list of names, such as \[a,b\]\), got 'gsm8k'",
    "method=null": "Unknown method 'null'",
    "method=[fed_sb]": "Unknown method",
    "seed": r"Expected option=value, got 'seed'. Write seed=...",
    "methdo": "Did you mean 'method'?",
    "seed=": "got ''",
    "=3": "Unknown option ''",
    "seed=1=2": "Expected option=value",
    "data.path={": "Expected option=value",
    "seed=0,x": "got 'x'",
    "method=fed_sb,fedsb": "Unknown method 'fedsb'",
    "seed=interval(0,1)": "Expected a sweep over listed values",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_reported_in_one_line_with_what_is_allowed(word):
    with pytest.raises(UserError, match=MISTAKES[word]) as caught:
        parse(["seed=1", word])
    assert "\n" not in str(caught.value)


def test_nested_mistakes_point_to_the_help():
    with pytest.raises(UserError, match="fedsim run --help"):
        parse(["training.lerning_rate=1"])


@pytest.mark.parametrize("word", ["~method", "~training", "~data=embedded"])
def test_a_group_cannot_be_removed(word):
    with pytest.raises(UserError, match="a group always has one"):
        parse([word])


ACCEPTED = ["seed=1", "method=fed_sb", "data.train=[a,b]", "data.path=null", "training.learning_rate=1e-3", "training.optimizer=sgd"]
ACCEPTED += [
    "model.name=${data.name}",
    "hydra/launcher=joblib",
    "hydra.launcher.n_jobs=2",
    "training.local_epochs=null",
    "resume=yes",
]


@pytest.mark.parametrize("word", ACCEPTED)
def test_valid_overrides_are_accepted(word):
    assert parse([word])[0].input_line == word


def test_sweeps_are_distinguished_from_single_values():
    words = ["seed=0,1", "data.train=[a,b]", "adapter.rank=choice(8,16)", "federation.rounds=range(1,4)", "run_dir='a,b'"]
    assert [override.input_line for override in swept(parse(words))] == [
        "seed=0,1",
        "adapter.rank=choice(8,16)",
        "federation.rounds=range(1,4)",
    ]


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20).filter(lambda text: "${" not in text))
def test_quoted_text_is_read_back_unchanged(text):
    assert parse([f"run_dir={quote(text)}"])[0].value() == text


def test_null_is_accepted_only_for_optional_options():
    assert compose(["adapter.init=null"]).adapter.init is None
    with pytest.raises(UserError, match=r"Expected training\.optimizer"):
        compose(["training.optimizer=null"])

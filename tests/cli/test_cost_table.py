import csv
import json
import subprocess
import sys

import pytest

from fedsim.cli.cost import amount, cost_table, costs, plain_rows
from fedsim.cli.main import main
from fedsim.core.methods import METHODS

EXAMPLE = ["model=mistral_7b", "method=fed_sb,fedit,flora", "adapter.rank=120,160,200", "federation.clients=25"]


def lines(*overrides):
    """Returns the cells of each row of the table, by the names of the columns."""
    head, rule, *rows = cost_table(costs(list(overrides))).split("\n\n")[1].splitlines()
    places = [(start, start + len(dashes)) for dashes, start in _runs(rule)]
    cells = lambda line: [line[first:last].strip() for first, last in places]  # noqa: E731
    return [dict(zip(cells(head), cells(row), strict=True)) for row in rows]


def _runs(rule):
    start = 0
    for dashes in rule.split("  "):
        yield dashes, start
        start += len(dashes) + 2


def notes(*overrides):
    """Returns the notes under the table, each as one line."""
    text = cost_table(costs(list(overrides))).split("\n\n")[2]
    return text.replace("\n  ", " ").splitlines()


def test_without_a_method_every_method_but_centralized_has_a_row():
    found = lines()
    assert [row["method"] for row in found] == [name for name in METHODS if name != "centralized"]
    assert {row["layers"] for row in found} == {"28"}
    by_method = {row["method"]: row for row in found}
    assert [by_method["fed_sb"][name] for name in ("rank", "trained", "up", "down")] == ["64", "115 k", "115 k", "115 k"]
    assert [by_method["fedit"][name] for name in ("rank", "up", "bases")] == ["32", "467 k", "0"]
    assert by_method["full"]["rank"] == "-"


def test_comma_separated_values_of_any_option_make_rows():
    found = lines(*EXAMPLE)
    assert [(row["method"], row["rank"]) for row in found] == [
        (method, rank) for method in ("fed_sb", "fedit", "flora") for rank in ("120", "160", "200")
    ]
    assert [row["up"] for row in found[:3]] == [row["published"] for row in found[:3]] == ["3.23 M", "5.73 M", "8.96 M"]
    assert [row["published"] for row in found[3:]] == [""] * 6
    assert [row["bases"] for row in found[:3]] == ["315 M", "419 M", "524 M"]
    other = lines("method=fed_sb", "federation.clients=2,3", "federation.rounds=4")
    assert [row["federation.clients"] for row in other] == ["2", "3"]


def test_published_counts_are_shown_and_differences_explained_once():
    found = {row["method"]: row for row in lines("model=mistral_7b")}
    assert [found[name]["published"] for name in ("fedit", "ffa_lora", "fedex_lora", "flora")] == [
        "83.9 M",
        "41.9 M*",
        "2,097 M*",
        "2,097 M",
    ]
    assert [found[name]["up"] for name in ("fedit", "ffa_lora")] == ["83.9 M", "44.0 M"]
    assert [found[name]["down"] for name in ("fedex_lora", "flora")] == ["2,181 M", "2,097 M"]
    told = notes("model=mistral_7b", "method=ffa_lora,fedex_lora", "seed=0,1")
    assert len(told) == len(set(told))
    assert sum("published is half of LoRA's" in note for note in told) == 1
    assert sum("2502.15436" in note for note in told) == 1


def test_no_published_count_is_shown_for_settings_that_differ_from_the_publication():
    for other in ("federation.fraction=0.5", "method.residual=dense", "federation.clients=24", "adapter.target_modules=[q_proj]"):
        assert "published" not in lines("model=mistral_7b", "method=flora", other)[0]


def test_a_note_names_what_the_published_count_leaves_out():
    assert any("up to 524 M for each client" in note for note in notes("model=mistral_7b", "method=fed_sb", "adapter.rank=200"))


def test_json_and_csv_rows_are_flat_and_hold_exact_numbers(capsys):
    assert main(["cost", *EXAMPLE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 9
    assert all(not isinstance(value, (dict, list)) for row in found for value in row.values())
    assert (found[2]["method"], found[2]["adapter.rank"], found[2]["rank"]) == ("fed_sb", "200", 200)
    assert found[2]["round_up_parameters"] == 224 * 200**2
    assert found[2]["client_bases_parameters"] == 524_288_000
    assert found[2]["published_parameters"] == 8_960_000
    assert main(["cost", "--csv", *EXAMPLE]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in found] == rows


def test_a_preset_with_a_sweep_gives_a_row_for_each_job():
    found = plain_rows(costs(["experiment=fed_sb_vs_centralized", "federation.rounds=2"]))
    assert [row["method"] for row in found] == ["fed_sb", "centralized"]
    assert not any(value for name, value in found[1].items() if name.startswith("total_"))


def test_methods_that_the_options_exclude_are_left_out_with_a_note(capsys):
    overrides = ["training=sgd", "training.momentum=0", "training.scaffold=true"]
    assert {row["method"] for row in lines(*overrides)} == {"fed_sb", "fedit", "ffa_lora", "lora_xs", "full"}
    (note,) = (note for note in notes(*overrides) if note.startswith("left out"))
    assert "flora" in note
    assert "no common factors" in note
    assert main(["cost", *overrides, "--json"]) == 0
    output = capsys.readouterr()
    assert len(json.loads(output.out)) == 5
    assert output.err == f"{note}\n"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=fed_sb,fedit", "adapter.init=gradient"], "method=fedit: adapter.init: method=fedit starts from lora"),
        (["method=fedit", "adapter.init=gradient"], "fedsim: adapter.init: method=fedit starts from lora"),
        (["model.path=some/model"], "nothing is downloaded to learn shapes"),
        (["model.path=some/model", "--json"], "nothing is downloaded to learn shapes"),
        (["federation.clients=0"], "Expected federation.clients >= 1"),
        (["adapter.rnk=3,4"], "Did you mean 'adapter.rank'?"),
        (["method=fedsb"], "Did you mean 'fed_sb'?"),
        (["--json", "--csv"], "got both"),
        (["--jsn"], "Did you mean '--json'?"),
        (["run_dir=a,b"], "Expected one value of run_dir"),
        (["model=mistral_7b", "method=full", "compression.name=int8"], "compression.name=int8: Expected a number of parameters from 1 to"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_exit_code_two(overrides, told, capsys):
    assert main(["cost", *overrides]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert told in output.err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=fed_sb", "adapter.init_samples=3"], "Initial gradients come from 3 of 25 clients"),
        (["method=rolora"], "rolora: factors take turns"),
        (["method=flora"], "method.residual=dense would send less down: flora 1.77 M instead of 11.7 M."),
        (["method=flexlora", "adapter.rank=null", "federation.ranks={4:1,8:1}"], "means over all clients"),
        (["method=fedit", "compression.name=int8"], "smaller in bytes"),
        (["method=fedit", "privacy=example"], "privacy budget"),
    ],
)
def test_notes_explain_what_the_numbers_leave_out(overrides, told):
    assert any(told in note for note in notes(*overrides))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *(
            (0, "0"),
            (999, "999"),
            (1000, "1.00 k"),
            (466_944, "467 k"),
            (999_999, "1,000 k"),
            (8_960_000, "8.96 M"),
            (83_886_080, "83.9 M"),
        ),
        *((2_097_152_000, "2,097 M"), (13_999_000_000, "14.0 G"), (2.1e13, "21.0 T")),
    ],
)
def test_amounts_keep_three_digits_or_the_whole_unit(number, expected):
    assert amount(number) == expected


def test_the_cost_command_loads_neither_flower_nor_data_nor_the_session():
    script = (
        "import sys\nfrom fedsim.cli.main import main\nassert main(['cost', 'method=fed_sb']) == 0\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "115 k" in done.stdout
    assert {"flwr", "datasets", "opacus", "fedsim.session"}.isdisjoint(done.stderr.split())

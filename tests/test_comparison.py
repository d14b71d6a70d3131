"""The picture of a sweep, read back from the figure itself."""

import pytest
from test_pictures import lines_of, png_size

from fedsim.comparison import Finished, comparison, comparison_png


def job(label, num_bytes, loss=1.0, **accuracies):
    events = [{"kind": "round", "round": r, "train_loss": loss / r} for r in (1, 2)]
    communication = {"uplink_bytes": num_bytes // 2, "downlink_bytes": num_bytes // 4, "setup_bytes": num_bytes // 4}
    evaluation = {task: {"base": {"accuracy": 0.0}, "final": {"accuracy": value}} for task, value in accuracies.items()}
    return Finished(label, events, {"evaluation": evaluation, "communication": communication})


def test_a_sweep_is_drawn_as_loss_by_round_and_accuracy_over_bytes():
    training, sums, words = comparison([job("one", 2_000_000, sums=0.5, words=0.25), job("pooled", 0, sums=0.75, words=None)]).axes
    assert lines_of(training) == {"one": [(1, 1.0), (2, 0.5)], "pooled": [(1, 1.0), (2, 0.5)]}
    assert lines_of(sums)["one"] == [(2.0, 50.0)]
    assert set(sums.lines[1].get_ydata()) == {75.0}, "who sends nothing is a line across"
    assert lines_of(words) == {"one": [(2.0, 25.0)], "pooled": []}
    assert "(MB)" in sums.get_xlabel()
    assert [text.get_text() for text in words.get_legend().get_texts()] == ["one", "pooled"]


@pytest.mark.parametrize(("losses", "shown"), [((float("nan"), float("nan")), True), ((float("nan"), 1.0), False)])
def test_the_training_panel_says_so_if_no_job_reports_a_loss(losses, shown):
    training, *_ = comparison([job(name, 2_000_000, loss, sums=0.5) for name, loss in zip(("one", "two"), losses, strict=True)]).axes
    assert ([text.get_text() for text in training.texts] == ["withheld: private clients do not report it"]) is shown


def test_a_task_without_any_exact_answer_is_drawn_by_its_held_out_loss():
    one, two = job("one", 2_000_000, texts=0.0, sums=0.0), job("two", 4_000_000, texts=0.0, sums=0.5)
    one.summary["evaluation"]["texts"]["final"]["loss"] = 1.25
    two.summary["evaluation"]["texts"]["final"]["loss"] = None
    _, texts, sums = comparison([one, two]).axes
    assert lines_of(texts) == {"one": [(2.0, 1.25)], "two": []}
    assert texts.get_title() == "texts, final held-out loss (nats)"
    assert sums.get_title() == "sums, final accuracy (%)"


def test_a_sweep_over_many_tasks_is_drawn_by_their_mean():
    _, mean = comparison([job("one", 2000, a=0.0, b=0.2, c=0.4, d=0.6)]).axes
    assert lines_of(mean) == {"one": [(2.0, 30.0)]}
    assert "mean of 4 tasks" in mean.get_title()


def test_jobs_of_one_label_are_drawn_as_their_mean_and_standard_deviation():
    jobs = [job("one", 2_000_000, sums=0.5), job("pooled", 0, sums=0.6), job("one", 4_000_000, sums=0.7), job("pooled", 0, sums=0.6)]
    figure = comparison(jobs)
    training, sums = figure.axes
    assert lines_of(training) == {"one": [(1, 1.0), (2, 0.5)], "pooled": [(1, 1.0), (2, 0.5)]}
    assert lines_of(sums)["one"] == [(3.0, 60.0)]
    (bar,) = (collection.get_segments()[0].tolist() for collection in sums.collections if collection.get_segments())
    half = 20 / 2**0.5
    assert bar == [[3.0, pytest.approx(60 - half)], [3.0, pytest.approx(60 + half)]]
    assert figure.get_suptitle() == "mean and standard deviation of 2 seeds"
    assert [text.get_text() for text in sums.get_legend().get_texts()] == ["one", "pooled"]


def test_the_band_of_a_loss_spans_one_standard_deviation_on_each_side():
    low, high = (job("one", 2000, loss=loss) for loss in (1.0, 3.0))
    (band,) = comparison([low, high]).axes[0].collections
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == (pytest.approx(1 - 0.5**0.5), pytest.approx(2 + 2**0.5))


@pytest.mark.parametrize("jobs", [[job("a", 0, sums=None)], [job("a", 16, sums=0.1), job("b", 10**9, words=0.2)], [job("a", 8)]])
def test_sweeps_with_missing_or_different_tasks_are_drawn(jobs):
    width, height = png_size(comparison_png(jobs))
    assert width > height


@pytest.mark.parametrize(("count", "named"), [(2, True), (60, True), (61, False)])
def test_the_names_of_many_jobs_get_their_own_space_and_too_many_are_not_shown(count, named):
    figure = comparison([job(f"federation.clients=5 training.learning_rate=0.001 seed={i}", 2000, sums=0.5) for i in range(count)])
    figure.draw_without_rendering()  # a warning about missing room would be an error
    training, sums = figure.axes
    assert min(training.get_position().width, sums.get_position().width) * figure.get_figwidth() > 3.0
    assert (sums.get_legend() is not None) == named
    if named:
        assert sums.get_legend().get_window_extent().x1 <= figure.bbox.width
        assert sums.get_legend().get_window_extent().y0 >= 0

"""Plots from made-up arrays: what is drawn is what was given; and the report of a real run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.patches import Polygon, Rectangle
from PIL import Image

from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import OutputError
from efficientai_toolkit.intervals import difference, mean_ci95
from efficientai_toolkit.runs import plots
from efficientai_toolkit.runs.build import build, checkpoint_file, restore
from efficientai_toolkit.runs.evaluate import evaluate_built, seen
from efficientai_toolkit.runs.plots import Curve
from efficientai_toolkit.runs.report import start_values, write_report
from efficientai_toolkit.runs.train import train

RNG = np.random.default_rng(0)


def texts(figure):
    found = [figure._suptitle.get_text()] if figure._suptitle else []
    for axis in figure.axes:
        found += [axis.get_title(loc) for loc in ("left", "center")]
        found += [text.get_text() for text in axis.texts]
    return [text for text in found if text]


def looks_drawn(figure, tmp_path):
    """The saved PNG opens, is of a fair size, and is not blank."""
    with Image.open(plots.save(figure, tmp_path / "figure.png")) as image:
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_training_curves_draw_every_curve_and_label_it(tmp_path):
    x = np.arange(0, 1000, 10)
    panels = {
        "loss": {
            "training": Curve(x, np.exp(-x / 300) + 0.1 * RNG.random(100)),
            "validation": Curve([0, 500, 1000], [1.0, 0.5, 0.4], [0.1, 0.1, 0.1]),
        },
        "accuracy": {"validation": Curve([0, 500, 1000], [0.5, 0.7, 0.8], [0.1, 0.1, 0.1])},
    }
    figure = plots.training_curves(panels, "A run")
    assert len(figure.axes) == 2
    assert texts(figure).count("validation") == 2
    assert "training" in texts(figure)
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [0.5, 0.7, 0.8])
    looks_drawn(figure, tmp_path)


def test_one_validation_is_a_mark(tmp_path):
    figure = plots.training_curves({"loss": {"validation": Curve([20], [1.5], [0.1])}}, "A run")
    line = figure.axes[0].lines[0]
    assert line.get_marker() == "o"
    assert len(figure.axes[0].collections) == 2  # the interval and its empty band
    assert figure.axes[0].get_xlim()[0] == 0
    looks_drawn(figure, tmp_path)


def test_a_title_is_no_longer_than_the_axes_and_intervals_stand_side_by_side():
    curves = {name: Curve([1, 5], [0.2, 0.3], [0.1, 0.1]) for name in "abc"}
    axis = plots.comparison(curves, "accuracy", "K = 5: accuracy of one and of another " * 2).axes[0]
    assert max(map(len, axis.get_title("left").splitlines())) <= 60
    assert len({line.get_xdata()[0] for line in axis.lines}) == 3


def test_labels_of_lines_that_end_together_do_not_overlap():
    curves = {name: Curve([1, 5, 10], [0.5, 0.7, 0.8 + i / 1000], [0.01] * 3) for i, name in enumerate("abc")}
    axis = plots.comparison(curves, "accuracy", "t").axes[0]
    heights = sorted(text.xy[1] for text in axis.texts)
    assert np.diff(heights).min() >= 0.075 - 1e-9


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_label_stands_at_the_end_of_its_line(metric):
    curves = {"low": Curve([1, 5], [0.2, 0.3]), "high": Curve([1, 5], [0.2, 0.8])}
    axis = plots.comparison(curves, metric, "t").axes[0]
    low, high = axis.get_ylim()
    for text in axis.texts:
        end = {"low": 0.3, "high": 0.8}[text.get_text()]
        assert text.xy[1] == pytest.approx((end - low) / (high - low), abs=1e-6)


def test_adaptation_curve_marks_the_trained_number_of_steps(tmp_path):
    curve = Curve([0, 1, 2, 3], [3.0, 1.0, 0.5, 0.4], [0.5, 2.0, 0.1, 0.1])
    figure = plots.adaptation_curves({"maml": curve}, "loss", "t", trained_steps=1)
    axis = figure.axes[0]
    assert any(line.get_xdata()[0] == 1 and len(set(line.get_xdata())) == 1 for line in axis.lines)
    assert "as trained" in texts(figure)
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() >= 0  # a loss has no interval below zero
    looks_drawn(figure, tmp_path)


def test_distribution_counts_every_finite_task(tmp_path):
    before, after = RNG.normal(3, 1, 200).clip(0), RNG.normal(1, 0.5, 200).clip(0)
    after[:3] = [np.nan, np.inf, 50.0]
    figure = plots.metric_distribution(before, after, "loss", "t")
    axis = figure.axes[0]
    assert sum(patch.get_height() for patch in axis.patches if isinstance(patch, Rectangle)) == 198
    (outline,) = (patch for patch in axis.patches if isinstance(patch, Polygon))
    assert outline.get_xy()[:, 1].max() >= 10
    assert axis.get_xticklabels()[-1].get_text().startswith("≥ ")  # where what is beyond the axis is counted
    looks_drawn(figure, tmp_path)


def test_distribution_of_a_learner_without_steps_has_no_before(tmp_path):
    figure = plots.metric_distribution(None, RNG.uniform(0.5, 1, 100), "accuracy", "t")
    assert len(texts(figure)) == 2
    assert texts(figure)[1].startswith("after: mean")
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 100


def test_predictions_show_support_and_both_functions(tmp_path):
    grid = np.linspace(-5, 5, 50)
    x = RNG.uniform(-5, 5, 30)
    task = plots.RegressionTask(x[:5], np.sin(x[:5]), x, np.sin(x), grid, 0 * grid, np.sin(grid), (0.52, 0.0))
    figure = plots.predictions([task] * 4, "t")
    shown = [axis for axis in figure.axes if axis.lines]
    assert len(shown) == 4
    np.testing.assert_array_equal(shown[0].lines[2].get_ydata(), np.sin(grid))
    assert shown[0].get_title("left") == "squared error 0.52 → 0"
    assert shown[0].get_shared_y_axes().joined(*shown[:2])
    looks_drawn(figure, tmp_path)


def test_decision_regions_before_and_after(tmp_path):
    x, y = RNG.normal(size=(25, 2)), RNG.integers(0, 3, 25)
    grid = np.add.outer(np.arange(20), np.arange(20)) // 14
    task = plots.PlaneTask(x[:5], y[:5], x[5:], y[5:], (-2, 2, -2, 2), 0 * grid, grid, (0.4, 0.9))
    figure = plots.decision_regions([task, task], "t")
    assert [axis.get_title("left") for axis in figure.axes] == ["before: 40 %"] * 2 + ["after: 90 %"] * 2
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), grid)
    looks_drawn(figure, tmp_path)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_image_task_names_wrong_predictions(tmp_path, channels):
    images = RNG.random((9, 12, 12, *channels))
    y = np.array([0, 1, 2, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 1, 2, 2, 2])
    figure = plots.image_task(plots.ImageTask(images[:3], y[:3], images[3:], y[3:], predicted), "t")
    assert sum(len(axis.images) for axis in figure.axes) == 9
    assert sorted(t for t in texts(figure) if t.startswith("taken")) == ["taken for C"]
    looks_drawn(figure, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    figure = plots.adaptation_curves({"a": Curve([0, 1], [1, 0.5])}, "loss", "t")
    with pytest.raises(OutputError, match="cannot write"):
        plots.save(figure, tmp_path / "file" / "figure.png")


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        (["sinusoid"], {"training_curves", "adaptation_curve", "loss_distribution", "predictions"}),
        (
            ["linear_classification"],
            {"training_curves", "adaptation_curve", "accuracy_distribution", "decision_regions"},
        ),
    ],
)
def test_report_of_a_run(tmp_path, families, expected):
    config = MetaLearningConfig(
        num_meta_iterations=20,
        eval_interval=10,
        num_inner_steps=2,
        task_distribution={"task_families": families, "num_val_tasks": 4, "num_test_tasks": 12},
        model={"backbone": "mlp", "hidden_dim": 8},
        evaluation={"episodes": 12},
        paths={"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints")},
        logging={"tensorboard_enabled": False},
    )
    run = train(config)["run"]
    report = write_report(run, episodes=12)
    assert {path.stem for path in report.plots} == expected
    page = report.html.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(expected)
    assert not re.search(r"(src|href)='(?!data:)", page)  # one file, nothing to fetch
    assert "prefers-color-scheme: dark" in page
    test = json.loads((report.html.parent / "evaluation.json").read_text())
    stale = report.html.parent / "evaluation.json"
    stale.write_text(json.dumps({**test, "iteration": -1}))
    write_report(run, episodes=12)
    assert json.loads(stale.read_text())["iteration"] == test["iteration"]  # not that of an older checkpoint
    assert test["metrics"].keys() == report.evaluation["metrics"].keys()
    assert f"on {seen(test)}" in page
    assert "Before meta-training the same learner reaches " in page
    assert test["episodes"] == 12
    write_report(run, episodes=3)
    assert json.loads(stale.read_text())["episodes"] == 12
    assert json.loads(stale.with_name("evaluation_episodes=3.json").read_text())["episodes"] == 3
    assert all(f"alt='{text}" in page for text in ("Held-out ", "Adaptation helps in "))


def test_the_report_has_the_configured_number_of_episodes_and_what_the_start_reaches_on_them(tmp_path):
    config = MetaLearningConfig(
        num_meta_iterations=20,
        num_inner_steps=1,
        task_distribution={"task_families": ["linear_classification"], "num_val_tasks": 4, "num_test_tasks": 12},
        model={"hidden_dim": 8},
        evaluation={"episodes": 7},
        paths={"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "checkpoints")},
        logging={"tensorboard_enabled": False},
    )
    run = train(config)["run"]
    built = restore(checkpoint_file(run))
    evaluation = evaluate_built(built)
    start = start_values(built, evaluation)
    untrained = evaluate_built(build(config)).per_task
    for name, values in start.items():
        np.testing.assert_array_equal(values, untrained[name])
    ours = mean_ci95(evaluation.per_task["step_1_acc"] - start["step_1_acc"], evaluation.tasks)
    page = write_report(run).html.read_text(encoding="utf-8")
    assert f"; the difference is {difference(*ours, percent=True)}." in page
    assert "7 unseen tasks" in page

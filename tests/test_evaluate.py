"""Evaluation: what is reported is what the per-task values say, on tasks that training never saw."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit import (
    MAML,
    MLP,
    MAMLLearner,
    MetaSGDLearner,
    PrototypicalNetwork,
    ReptileLearner,
    SimpleClassifier,
)
from efficientai_toolkit.cli import app
from efficientai_toolkit.cli.evaluate import show, whole_numbers
from efficientai_toolkit.config import MetaLearningConfig, Override
from efficientai_toolkit.errors import CheckpointError, ConfigurationError
from efficientai_toolkit.files import read_json
from efficientai_toolkit.intervals import mean_ci95
from efficientai_toolkit.nn.layers import Dropout
from efficientai_toolkit.runs.build import restore
from efficientai_toolkit.runs.evaluate import (
    draw,
    evaluate_checkpoint,
    evaluate_tasks,
    report_path,
    seen,
    steps_to_share,
)
from efficientai_toolkit.runs.train import train
from efficientai_toolkit.tasks.distribution import TaskConfig, TaskDistribution


def distribution(family="linear_classification", count=8, **kwargs):
    return TaskDistribution([TaskConfig(f"{family}_{i}", family, **kwargs) for i in range(count)], seed=3)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = MetaLearningConfig(
        num_meta_iterations=20,
        num_inner_steps=3,
        task_distribution={"task_families": ["linear_classification"], "num_test_tasks": 12, "num_val_tasks": 4},
        model={"hidden_dim": 8},
        paths={"output_dir": str(folder / "experiments"), "checkpoint_dir": str(folder / "checkpoints")},
        logging={"tensorboard_enabled": False},
    )
    return train(config)


def test_report_of_a_checkpoint(trained_run):
    report = evaluate_checkpoint(trained_run["run"], episodes=12, steps=(1, 5)).report
    assert report["steps"] == [0, 1, 3, 5]  # 0 and the trained number are always there
    assert report["headline"]["steps"] == 3
    assert report["headline"]["mean"] == report["metrics"]["step_3_acc"]
    assert report["headline"]["diverged_tasks"] == 0
    assert report["extrapolated_steps"] == []  # SGD's one rate is the same at every step
    assert report["trainable_parameters"] == trained_run["trainable_parameters"]
    assert report["seconds_per_task"] > 0
    assert report["peak_memory_bytes_per_task"] > 0
    assert read_json(report["file"]) == report
    assert report["file"].startswith(trained_run["run"])


def test_the_same_checkpoint_gives_the_same_numbers(trained_run, tmp_path):
    first, second = (
        evaluate_checkpoint(trained_run["latest_best"], episodes=60, output=tmp_path / f"{i}.json") for i in range(2)
    )
    assert first.report["metrics"] == second.report["metrics"]
    for name, values in first.per_task.items():
        np.testing.assert_array_equal(values, second.per_task[name])


def test_another_seed_draws_other_tasks_for_the_same_model(tmp_path):
    config = MetaLearningConfig.from_dict(
        {
            "meta_learning": {"num_meta_iterations": 1, "seed": 3},
            "task_distribution": {"num_test_tasks": 4, "num_val_tasks": 2},
            "model": {"hidden_dim": 8},
            "adapter": {"method": "lora", "rank": 2},  # over weights that are frozen as they were drawn
            "paths": {"output_dir": str(tmp_path), "checkpoint_dir": str(tmp_path / "checkpoints")},
            "logging": {"tensorboard_enabled": False},
        }
    )
    path = train(config)["checkpoints"]["last"]
    same, other = restore(path), restore(path, [Override("meta_learning.seed", 4, "--set")])
    x = same.splits.test.batch_at(0, 1)[0].query_x[0]
    assert not np.array_equal(x, other.splits.test.batch_at(0, 1)[0].query_x[0])
    np.testing.assert_array_equal(same.learner.model(x), other.learner.model(x))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.head = Dropout(0.5), nn.Linear(2, 2)

    def __call__(self, x):
        return self.head(self.dropout(x))


def test_what_is_random_is_a_tasks_own_and_a_steps_own():
    stack = distribution(count=8).batch_at(0, 8)
    model = Dropping()

    def losses(steps, **options):
        learner = ReptileLearner(model, inner_lr=0.5, inner_batch_size=2, **options)
        return learner.evaluate_per_task(stack, num_adaptation_steps=steps)["step_3_loss"]

    expected = losses((3,))
    np.testing.assert_allclose(losses((3,), chunk=1), expected, rtol=1e-5)  # however the tasks are cut into graphs
    np.testing.assert_allclose(losses((3,), chunk=3), expected, rtol=1e-5)
    np.testing.assert_allclose(losses((1, 3, 7)), expected, rtol=1e-5)  # whatever is measured besides
    assert len(set(expected.tolist())) == len(expected)


def test_means_and_intervals_are_those_of_the_tasks():
    learner = ReptileLearner(SimpleClassifier(hidden_dim=8), inner_lr=0.1, num_inner_steps=2)
    found = evaluate_tasks(learner, distribution(), episodes=8, steps=(2,))
    values = found.per_task["step_2_acc"].astype(np.float64)
    assert values.shape == (8,)
    assert found.report["metrics"]["step_2_acc"] == pytest.approx(values.mean(), abs=1e-12)
    expected = 2.365 * values.std(ddof=1) / np.sqrt(8)
    assert found.report["metrics"]["step_2_acc_ci95"] == pytest.approx(expected, rel=1e-6)


def test_a_report_says_of_how_many_tasks_its_episodes_are():
    learner, tasks = ReptileLearner(SimpleClassifier(hidden_dim=8)), distribution(count=8)
    found = evaluate_tasks(learner, tasks, episodes=60, steps=(1,))
    assert (found.report["episodes"], found.report["tasks"]) == (60, 8)
    assert seen(found.report) == "60 episodes of 8 unseen tasks"
    expected = mean_ci95(found.per_task["step_1_acc"], found.tasks)[1]
    assert found.report["metrics"]["step_1_acc_ci95"] == expected
    assert expected != mean_ci95(found.per_task["step_1_acc"])[1]


def test_a_diverged_task_gives_null_not_nan(tmp_path):
    learner = MAML(MLP(), lr_inner=1e4, num_inner_steps=5)
    report = evaluate_tasks(learner, distribution("sinusoid", support_size=10), episodes=8).report
    assert report["metrics"]["step_10_loss"] is None
    assert report["headline"]["mean"] is None
    assert report["headline"]["diverged_tasks"] > 0
    assert report["metrics"]["step_0_loss"] > 0
    assert report["adaptation_speed"]["steps_to_90_percent"] is None


def test_meta_sgd_trained_with_one_step_diverges_at_five_and_its_headline_is_at_one():
    """Its rates are those of one large step; said in docs/results.md."""
    template = TaskConfig("sinusoid", "sinusoid", num_classes=1, input_dim=1, support_size=10, query_size=10)
    tasks = TaskDistribution([template], endless=True)
    learner = MetaSGDLearner(MLP(1, 1, 40, 2), outer_lr=0.01, num_inner_steps=1)
    learner.meta_train(tasks, num_iterations=400, meta_batch_size=16)
    unseen = TaskDistribution([template], 1, endless=True, stream="unseen")
    report = evaluate_tasks(learner, unseen, episodes=100, steps=(1, 5)).report
    before, at_one, at_five = (report["metrics"][f"step_{k}_loss"] for k in (0, 1, 5))
    assert report["headline"]["steps"] == 1
    assert report["headline"]["mean"] == at_one < before
    assert at_five is None or at_five > 10 * at_one


def test_steps_beyond_the_trained_number_are_marked_for_per_step_rules(monkeypatch):
    monkeypatch.setattr(MAMLLearner, "per_step_rule", True)
    learner = MAMLLearner(SimpleClassifier(hidden_dim=8), num_inner_steps=1)
    report = evaluate_tasks(learner, distribution(), episodes=4, steps=(0, 1, 5)).report
    assert report["extrapolated_steps"] == ["step_5_acc", "step_5_acc_ci95", "step_5_loss", "step_5_loss_ci95"]
    assert report["adaptation_speed"]["of_the_gain_after"] == 1


@pytest.mark.parametrize(
    ("kind", "means", "expected"),
    [
        ("acc", [0.5, 0.8, 0.96, 1.0], 2),
        ("loss", [1.0, 0.4, 0.2, 0.1], 3),
        ("loss", [1.0, 0.19, 0.2, 0.1], 1),
        ("acc", [0.5, 0.4, 0.4, 0.4], None),
    ],
)
def test_adaptation_speed(kind, means, expected):
    per_task = {f"step_{k}_{kind}": np.array([mean, mean]) for k, mean in enumerate(means)}
    assert steps_to_share(per_task, range(4), kind, 3) == expected


def test_draw_gives_every_episode_and_the_same_ones():
    tasks = distribution(count=5, support_size=4, query_size=6)
    drawn = list(draw(tasks, 120))
    first = [stack for stacks, _ in drawn for stack in stacks]
    owners = [task for _, own in drawn for task in own]
    assert sum(stack.num_tasks for stack in first) == 120
    assert {owners.count(config.task_id) for config in tasks.configs} == {24}
    again = [stack for stacks, _ in draw(tasks, 120) for stack in stacks]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.array(one.query_x), np.array(other.query_x))


def test_every_episode_is_of_the_task_that_is_said():
    configs = [
        TaskConfig(f"{family} {shots} {i}", family, support_size=shots, query_size=20)
        for i in range(3)
        for family, shots in (("sinusoid", 5), ("sinusoid", 10))
    ]
    tasks = TaskDistribution(configs, seed=1)
    waves: dict[str, set] = {}
    for index in range(4):
        owners = iter(tasks.tasks_at(index, 8))
        for stack in tasks.batch_at(index, 8):
            for x, y in zip(np.array(stack.query_x)[..., 0], np.array(stack.query_y)[..., 0], strict=True):
                wave, *_ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y)  # A sin(x + φ) tells its task
                owner = next(owners)
                assert owner.split()[1] == str(stack.support_x.shape[1])
                waves.setdefault(owner, set()).add(tuple(np.round(wave, 2)))
    assert len(waves) == 6
    assert {len(found) for found in waves.values()} == {1}
    assert len(set.union(*waves.values())) == 6
    assert TaskDistribution(configs, seed=1, endless=True).tasks_at(0, 4) is None


def test_where_the_report_goes(tmp_path):
    assert report_path(tmp_path / "a.npz") == tmp_path / "a.evaluation.json"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert report_path(tmp_path / "checkpoints" / "best.npz") == tmp_path / "evaluation.json"
    assert report_path(tmp_path / "checkpoints" / "iter_40.npz") == tmp_path / "evaluation_iter_40.json"


def test_a_trial_leaves_the_report_of_the_run_alone(trained_run):
    run = Path(trained_run["run"])
    own = read_json(evaluate_checkpoint(run).report["file"])

    def where(*options):
        done = CliRunner().invoke(app, ["evaluate", "--checkpoint", str(run), "--json", *options])
        assert done.exit_code == 0, done.output
        return Path(json.loads(done.stdout)["file"])

    assert where("--episodes", "6") == run / "evaluation_episodes=6.json"
    options = ("--episodes", "6", "--steps", "1,2", "--set", "evaluation.transductive=false")
    assert where(*options) == run / "evaluation_episodes=6_steps=1,2_evaluation.transductive=false.json"
    assert read_json(run / "evaluation.json") == own
    long = [f"--set=task_distribution.task_params={{label_noise: 0.{i}}}" for i in (1, 2)]
    names = {where(*(3 * long[:1]), last).name for last in long}
    assert len(names) == 2  # cut, they would be one
    assert max(len(name) for name in names) < 140
    steps = read_json(run / "config.json")["evaluation"]["steps"]
    assert where("--steps", ",".join(map(str, reversed(steps)))) == run / "evaluation.json"
    assert where("--episodes", str(own["episodes"])) == run / "evaluation.json"


def test_impossible_requests_are_one_sentence(tmp_path):
    learner = ReptileLearner(SimpleClassifier(hidden_dim=8))
    with pytest.raises(ConfigurationError, match="episodes is 0"):
        evaluate_tasks(learner, distribution(), episodes=0)
    with pytest.raises(ConfigurationError, match="steps are"):
        evaluate_tasks(learner, distribution(), steps=(-1,))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate_checkpoint(tmp_path / "none.npz")
    with pytest.raises(ConfigurationError, match="--steps '1,x'"):
        whole_numbers("1,x", "--steps")
    assert whole_numbers("0,1,10", "--steps") == [0, 1, 10]


def test_table_shows_the_trained_row_and_intervals(trained_run, capsys):
    show(evaluate_checkpoint(trained_run["run"], episodes=12, steps=(1,)).report)
    text = capsys.readouterr().out
    assert "3 (trained)" in text
    assert "12 unseen tasks" in text


def test_a_closed_form_is_one_row(capsys):
    learner = PrototypicalNetwork(SimpleClassifier(2, 8, 2), num_inner_steps=5)
    report = evaluate_tasks(learner, distribution(), episodes=6, steps=(0, 1, 5)).report
    assert report["metrics"]["step_0_acc"] == report["metrics"]["step_5_acc"]
    show(report)
    text = capsys.readouterr().out
    assert text.count("%") == 3  # two titles, and the accuracy of the one row
    assert "in closed form" in text

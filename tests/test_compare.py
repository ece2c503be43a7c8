"""Comparison with baselines: the same K examples for all, and nothing measured on what was borrowed."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from efficientai_toolkit import MLP, BaselineComparison, MAMLLearner, ReptileLearner, SimpleClassifier
from efficientai_toolkit.cli.compare import show
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ConfigurationError, ModelError, TaskSamplingError
from efficientai_toolkit.files import read_json
from efficientai_toolkit.intervals import difference
from efficientai_toolkit.nn.functional import trainable
from efficientai_toolkit.recipes.baseline import choose_rate, joint_pretraining, untrained_model
from efficientai_toolkit.recipes.compare import compare_run, with_shots, with_support
from efficientai_toolkit.runs.build import build
from efficientai_toolkit.tasks.distribution import TaskConfig, TaskDistribution
from efficientai_toolkit.tasks.episode import EpisodeStack


def distribution(family="linear_classification", count=6, **kwargs):
    return TaskDistribution([TaskConfig(f"{family}_{i}", family, **kwargs) for i in range(count)], seed=1)


def numbered(support, query, classes=None):
    """An episode whose inputs are their row numbers, so that it shows where each went."""
    x = mx.arange(support + query).astype(mx.float32)[:, None]
    y = x if classes is None else mx.array(np.array(classes, np.int32))
    return x[:support], y[:support], x[support:], y[support:]


def rows(array):
    return [int(v) for v in np.array(array).ravel()]


def test_k_within_the_support_takes_its_first_rows():
    cut = with_shots([numbered(5, 3)], [1, 3])
    assert rows(cut[1][0].support_x) == [0]
    assert rows(cut[3][0].support_x) == [0, 1, 2]
    assert rows(cut[1][0].query_x) == rows(cut[3][0].query_x) == [5, 6, 7]


def test_a_larger_k_borrows_from_the_query_and_never_measures_on_it():
    cut = with_shots([numbered(2, 6), numbered(2, 6)], [1, 5])
    (one,), (five,) = cut[1], cut[5]
    assert one.num_tasks == five.num_tasks == 2
    assert rows(five.support_x[0]) == [0, 1, 2, 3, 4]
    # The same examples at every K, none of them used at any K.
    assert rows(one.query_x[0]) == rows(five.query_x[0]) == [5, 6, 7]


def test_shots_per_class_take_as_many_of_each():
    classes = [0, 1, 0, 1, 1, 1, 0, 0, 1, 0]
    cut = with_shots([numbered(4, 6, classes)], [1, 3], per_class=True)
    assert rows(cut[1][0].support_x) == [0, 1]
    assert sorted(rows(cut[3][0].support_x)) == [0, 1, 2, 3, 4, 6]
    assert sorted(rows(cut[3][0].support_y)) == [0, 0, 0, 1, 1, 1]
    assert rows(cut[3][0].query_x) == [5, 7, 8, 9]


def test_shots_in_all_take_the_classes_in_turn():
    classes = [0, 0, 0, 0, 1, 1, 0, 1]
    cut = with_shots([numbered(5, 3, classes)], [2, 5], per_class=False)
    assert rows(cut[2][0].support_y) == [0, 1]
    assert sorted(rows(cut[5][0].support_x)) == [0, 1, 2, 3, 4]


def test_whether_k_counts_classes_follows_the_support():
    balanced = with_shots([numbered(4, 8, [0, 1, 0, 1, *[0, 1] * 4])], [2])
    assert len(rows(balanced[2][0].support_y)) == 4
    unbalanced = with_shots([numbered(5, 8, [0, 1, 0, 1, 1, *[0, 1] * 4])], [2])
    assert len(rows(unbalanced[2][0].support_y)) == 2


def test_too_few_examples_are_one_sentence():
    with pytest.raises(TaskSamplingError, match=r"episode 0 .* K = 10 .* larger query_size"):
        with_shots([numbered(5, 5)], [10])
    with pytest.raises(TaskSamplingError, match="of each class"):
        with_shots([numbered(2, 4, [0, 1, 0, 0, 0, 1])], [4], per_class=True)
    with pytest.raises(ConfigurationError, match="k_shots"):
        with_shots([numbered(5, 5)], [0])


def test_episodes_keep_their_order_where_shapes_differ():
    stacks = [EpisodeStack(*(mx.stack([part] * 2) for part in numbered(4, n))) for n in (3, 5, 3)]
    cut = with_shots(stacks, [1, 2])[1]
    assert [stack.query_x.shape[1] for stack in cut for _ in range(stack.num_tasks)] == [3, 3, 5, 5, 3, 3]


def test_results_have_both_models_and_their_intervals():
    learner = ReptileLearner(SimpleClassifier(hidden_dim=16), inner_lr=0.1)
    learner.meta_train(distribution(), num_iterations=30)
    results = BaselineComparison().compare_few_shot_performance(
        learner, SimpleClassifier(hidden_dim=16), distribution().sample_batch(6), [1, 5, 10]
    )
    assert list(results) == [1, 5, 10]
    for row in results.values():
        assert {"meta_acc", "meta_ci95", "baseline_acc", "baseline_ci95"} <= set(row)
        assert 0 <= row["meta_acc"] <= 1
    assert results[10]["meta_acc"] > results[1]["meta_acc"]


def test_regression_has_losses():
    learner = MAMLLearner(MLP(hidden_dim=8), num_inner_steps=1)
    episodes = distribution("sinusoid", support_size=5, query_size=20).sample_batch(6)
    results = BaselineComparison().compare_few_shot_performance(learner, MLP(hidden_dim=8), episodes, [5, 10])
    assert set(results[5]) == {"meta_loss", "meta_loss_ci95", "baseline_loss", "baseline_loss_ci95"}


def test_equal_models_give_equal_results():
    model = SimpleClassifier(hidden_dim=8)
    learner = MAMLLearner(model, inner_lr=0.05, num_inner_steps=3)
    episodes = distribution().sample_batch(6)
    for pair in ((model, model), (learner, model)):
        row = BaselineComparison(lr=0.05, num_steps=3).compare_few_shot_performance(*pair, episodes, [5])[5]
        assert row["meta_acc"] == row["baseline_acc"]
        assert row["meta_loss"] == pytest.approx(row["baseline_loss"], abs=1e-6)


def test_the_models_are_left_as_they_are():
    model = SimpleClassifier(hidden_dim=8)
    before = {path: np.array(value) for path, value in trainable(model).items()}
    comparison = BaselineComparison()
    comparison.compare_few_shot_performance(model, model, distribution().sample_batch(4), [1])
    comparison.evaluate_standard_finetuning(model, distribution().sample_batch(4))
    joint_pretraining(model, distribution(), 5)
    for path, value in trainable(model).items():
        np.testing.assert_array_equal(np.array(value), before[path])


def test_finetuning_by_hand_gives_the_same():
    model, lr = MLP(hidden_dim=8), 0.02
    episode = [part[0] for part in distribution("sinusoid", support_size=5).sample_batch(1)[0]]
    sx, sy, qx, qy = episode
    report = BaselineComparison().evaluate_standard_finetuning(model, [tuple(episode)], num_steps=3, lr=lr)

    def loss(model, x, y):
        return nn.losses.mse_loss(model(x), y)

    assert report["loss_before"] == pytest.approx(float(loss(model, qx, qy)), rel=1e-5)
    for _ in range(3):
        grads = nn.value_and_grad(model, loss)(model, sx, sy)[1]
        model.update(tree_map(lambda p, g: p - lr * g, model.trainable_parameters(), grads))
    assert report["loss"] == pytest.approx(float(loss(model, qx, qy)), rel=1e-5)


def test_joint_pretraining_is_a_gradient_step_on_the_pooled_examples():
    tasks, model = distribution("sinusoid", count=3, support_size=5, query_size=7), MLP(hidden_dim=8)
    stack = tasks.batch_at(0, 3)[0]
    x = mx.concatenate([stack.support_x, stack.query_x], 1).reshape(-1, 1)
    y = mx.concatenate([stack.support_y, stack.query_y], 1).reshape(-1, 1)
    grads = nn.value_and_grad(model, lambda m: nn.losses.mse_loss(m(x), y))(model)[1]
    joint = trainable(joint_pretraining(model, tasks, 1, meta_batch_size=3, lr=0.01))
    before, flat = trainable(model), dict(tree_flatten(grads))
    for path, value in joint.items():
        # Adam's first step has the sign of the gradient and the size of its rate, where there is a gradient.
        moved, g = np.array(value - before[path]), np.array(flat[path])
        there = np.abs(g) > 1e-4
        np.testing.assert_array_equal(np.sign(moved[there]), -np.sign(g[there]))


def test_joint_pretraining_learns_what_tasks_share():
    params = {"rotation_angle": 0.3, "translation": 0.0}
    tasks = distribution(count=4, support_size=10, task_params=params)
    model = SimpleClassifier(hidden_dim=16)
    joint = joint_pretraining(model, tasks, 60, lr=0.01)
    episodes = tasks.batch_at(1000, 4)
    comparison = BaselineComparison()
    before, after = (comparison.evaluate_standard_finetuning(m, episodes, num_steps=1) for m in (model, joint))
    assert after["loss_before"] < 0.7 * before["loss_before"]


def test_choose_rate_takes_the_lowest_finite_loss():
    episodes = distribution("sinusoid", support_size=10).sample_batch(6)
    assert choose_rate(MLP(hidden_dim=16), episodes, [1e-9, 0.01, 1e6], 5) == 0.01


def test_more_support_keeps_the_tasks():
    tasks = distribution(support_size=2, query_size=4)
    larger = with_support(tasks, 8)
    assert [c.support_size for c in larger.configs] == [8] * 6
    assert [larger.task_seed(c) for c in larger.configs] == [tasks.task_seed(c) for c in tasks.configs]
    assert with_support(tasks, 1).configs[0].support_size == 2


def test_what_is_not_a_model_is_refused():
    with pytest.raises(ModelError, match="got str"):
        BaselineComparison().compare_few_shot_performance("x", SimpleClassifier(), distribution().sample_batch(2), [1])


def test_compare_run_writes_report_and_plot(tmp_path):
    config = MetaLearningConfig(
        algorithm="maml",
        inner_lr=0.05,
        num_inner_steps=2,
        task_distribution={"task_families": ["linear_classification"], "num_val_tasks": 4, "num_test_tasks": 8},
        model={"hidden_dim": 16},
    )
    built = build(config)
    built.learner.meta_train(built.splits.train, num_iterations=40)
    report = compare_run(built, k_shots=(1, 5), episodes=8, folder=tmp_path)
    assert report == read_json(tmp_path / "comparison.json")
    assert (tmp_path / "plots" / "comparison.png").stat().st_size > 5000
    assert set(report["results"]) == {"meta-learned", "random initialisation", "joint pre-training"}
    assert report["joint_iterations"] == 40
    assert report["results"]["meta-learned"]["5"]["acc"] > report["results"]["random initialisation"]["1"]["acc"]
    assert report["title"].startswith("K = 5")  # the number that training had
    means = {name: rows["5"]["acc"] for name, rows in report["results"].items()}
    apart = report["differences"]["random initialisation"]["5"]
    assert apart["acc"] == pytest.approx(means["meta-learned"] - means["random initialisation"])
    rival = max(report["differences"], key=means.__getitem__)
    row = report["differences"][rival]["5"]
    told = abs(row["acc"]) > row["acc_ci95"]
    assert report["title"].endswith(
        f"; {'the difference is ' if told else 'not told apart ('}"
        f"{difference(row['acc'], row['acc_ci95'], percent=True)}{'' if told else ')'}"
    )


def test_the_table_has_a_name_in_one_piece_and_one_step_in_words(capsys):
    names = ("meta-learned", "random initialisation", "joint pre-training")
    row = {"acc": 0.773, "acc_ci95": 0.025}
    report: dict = {"metric": "accuracy", "episodes": 8, "inner_steps": 1, "k_counts": "examples of each class"}
    ahead = {"acc": 0.026, "acc_ci95": 0.019}
    report["differences"] = {name: {"5": ahead} for name in names[1:]}
    show({**report, "k_shots": [5], "results": {name: {"5": row} for name in names}})
    text = capsys.readouterr().out
    assert "8 unseen tasks after one inner step" in " ".join(text.split())
    assert all(name in text for name in names)
    assert text.count("77.3 % ± 2.5") == 3
    assert text.count("+2.6 ± 1.9 points") == 2


def test_a_learner_without_steps_is_not_said_to_take_any(capsys):
    config = MetaLearningConfig(
        algorithm="protonet",
        num_inner_steps=0,
        task_distribution={"task_families": ["linear_classification"], "num_val_tasks": 4, "num_test_tasks": 4},
        model={"backbone": "mlp", "hidden_dim": 8},
    )
    report = compare_run(build(config), k_shots=(4,), episodes=4, iterations=1)
    assert report["rates"]["meta-learned"] is None
    show(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "4 unseen tasks (protonet adapts in closed form, fine-tuning takes 5 inner steps); K: all examples" in said


def test_too_few_images_are_told_before_a_baseline_is_trained(tmp_path, monkeypatch):
    for number in range(6 * 10):
        path = tmp_path / "image_folder" / ("train", "val", "test")[number % 3] / f"{number % 6}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
    config = MetaLearningConfig(
        algorithm="protonet",
        num_inner_steps=0,
        task_distribution={
            "task_families": ["image_folder"], "n_way": 2, "k_shot": 2, "query_per_class": 3, "num_val_tasks": 4,
            "num_test_tasks": 4, "task_params": {"image_size": 8, "grayscale": True},
        },
        model={"backbone": "mlp", "hidden_dim": 8},
        paths={"data_dir": str(tmp_path)},
    )  # fmt: skip
    built = build(config)
    monkeypatch.setattr("efficientai_toolkit.recipes.compare.joint_pretraining", None)
    said = r"^--shots 1,10 adapts to 10 examples of each class: .* has 10 images.*; give smaller numbers$"
    with pytest.raises(TaskSamplingError, match=said):
        compare_run(built, k_shots=(1, 10), episodes=4)


def test_shots_without_every_class_are_told_before_a_baseline_is_trained(monkeypatch):
    config = MetaLearningConfig(
        algorithm="protonet",
        num_inner_steps=0,
        task_distribution={"task_families": ["linear_classification"], "num_val_tasks": 4, "num_test_tasks": 4},
        model={"backbone": "mlp", "hidden_dim": 8},
    )
    built = build(config)
    monkeypatch.setattr("efficientai_toolkit.recipes.compare.joint_pretraining", None)
    with pytest.raises(TaskSamplingError, match=r"^--shots 1,4: protonet .* of K = 1 lack a class .*; give --shots 4$"):
        compare_run(built, k_shots=(1, 4), episodes=4)


def test_the_untrained_model_has_other_weights_of_the_same_shapes():
    built = build(MetaLearningConfig(model={"hidden_dim": 8}))
    own, fresh = trainable(built.learner.model), trainable(untrained_model(built))
    assert {p: v.shape for p, v in own.items()} == {p: v.shape for p, v in fresh.items()}
    assert not np.array_equal(np.array(own["head.weight"]), np.array(fresh["head.weight"]))

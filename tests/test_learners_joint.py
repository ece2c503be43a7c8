"""Joint training: labels that number the classes of the training split, and Baseline++ that is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientai_toolkit import ConfigurationError, MetaLearningConfig, TaskConfig, TaskDistribution, TaskSamplingError
from efficientai_toolkit.runs.build import build
from efficientai_toolkit.tasks.build import build_splits, num_labels

CLASSES = {"train": 6, "val": 3, "test": 3}
WAY = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes with a pattern each, and noise; the first pixel is the class's number over all splits, times 20."""
    root, rng = tmp_path_factory.mktemp("joint"), np.random.default_rng(0)
    for number, (split, name) in enumerate((s, c) for s, count in CLASSES.items() for c in range(count)):
        (root / split / f"{split} {name}").mkdir(parents=True)
        pattern = 200 * rng.integers(0, 2, (4, 4))
        for i in range(8):
            image = (pattern + rng.integers(0, 50, (4, 4))).astype(np.uint8)
            image[0, 0] = 20 * number
            Image.fromarray(image).save(root / split / f"{split} {name}" / f"{i}.png")
    return root


def configuration(folder: Path, **changes) -> MetaLearningConfig:
    sections = {
        "meta_learning": {"algorithm": "baseline++", "outer_lr": 0.01, "inner_lr": 0.2, "num_inner_steps": 20},
        "task_distribution": {
            "task_families": ["image_folder"],
            "n_way": WAY,
            "k_shot": 2,
            "query_per_class": 3,
            "num_train_tasks": None,
            "num_val_tasks": 10,
            "num_test_tasks": 10,
            "task_params": {"image_size": 4, "grayscale": True},
        },
        "model": {"backbone": "linear", "hidden_dim": 32},
        "paths": {"data_dir": str(folder)},
    }
    return MetaLearningConfig.from_dict(
        {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {*sections, *changes}}
    )


def true_classes(x) -> np.ndarray:
    """(…, 4, 4, 1) → (…), counted over all splits."""
    return np.round(255 * np.array(x)[..., 0, 0, 0] / 20).astype(int)


def test_labels_number_the_classes_of_the_training_split(folder):
    section = configuration(folder).task_distribution
    splits = build_splits(section, data_dir=folder, joint=True)
    assert num_labels(splits.train) == CLASSES["train"]
    (stack,) = splits.train.batch_at(0, 40)
    for x, y in ((stack.support_x, stack.support_y), (stack.query_x, stack.query_y)):
        assert np.array_equal(true_classes(x), np.array(y))  # a class has one number in every task
    assert set(np.array(stack.query_y).ravel()) == set(range(CLASSES["train"]))
    for held_out in (splits.val, splits.test):
        (stack,) = held_out.batch_at(0, 10)
        assert num_labels(held_out) == WAY
        assert {frozenset(row) for row in np.array(stack.query_y).tolist()} == {frozenset(range(WAY))}
    (stack,) = build_splits(section, data_dir=folder).train.batch_at(0, 40)
    assert num_labels(splits.val) == int(np.array(stack.query_y).max()) + 1 == WAY


def test_a_part_of_the_classes_numbers_its_own(folder):
    families = build_splits(configuration(folder).task_distribution, data_dir=folder).train.families
    params = {"image_size": 4, "grayscale": True, "k_shot": 2, "query_per_class": 2, "labels": "split"}
    tasks = TaskDistribution([TaskConfig("t", "image_folder", 2, task_params=params)], endless=True, families=families)
    _, held_out = tasks.split_tasks(0.5)
    (stack,) = held_out.batch_at(0, 40)
    assert num_labels(held_out) == 3
    assert np.array_equal(true_classes(stack.query_x) - 3, np.array(stack.query_y))
    with pytest.raises(TaskSamplingError, match="unknown labels 'splits'; did you mean 'split'"):
        TaskDistribution(
            [TaskConfig("t", "image_folder", task_params={**params, "labels": "splits"})], families=families
        )


def test_baseline_pp_by_configuration_learns_the_classes_of_its_split(folder):
    config, learner, splits = build(configuration(folder))
    assert learner.options["num_base_classes"] == config.learner["num_base_classes"] == CLASSES["train"]
    history = learner.meta_train(splits.train, num_iterations=60)
    assert max(history["query_accuracy"][:3]) < 0.7
    assert min(history["query_accuracy"][-5:]) > 0.9
    held_out = learner.evaluate(splits.test.batch_at(0, 10), num_adaptation_steps=(0, 20))
    assert held_out["step_20_acc"] > 0.8


def test_what_has_no_classes_cannot_be_trained_jointly(folder):
    for families in (["linear_classification"], ["image_folder", "omniglot"]):
        config = configuration(folder, task_distribution={"task_families": families})
        config.task_distribution.task_params = {}
        with pytest.raises(ConfigurationError, match="must be one image or text family, got " + ", ".join(families)):
            build(config)
    labelled = configuration(folder, task_distribution={"task_params": {"labels": "split"}})
    with pytest.raises(ConfigurationError, match="none of image_folder has 'labels'"):  # the algorithm decides
        build(labelled)


def test_a_split_without_classes_says_what_is_missing(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / name / f"{i}.png")
    config = configuration(tmp_path, meta_learning={"algorithm": "protonet"}, task_distribution={"n_way": 2})
    config.task_distribution.task_params = {"image_size": 4, "grayscale": True}
    with pytest.raises(TaskSamplingError, match="split 'val' has 0 of the data set's 3 classes, and a task needs at"):
        build_splits(config.task_distribution, data_dir=tmp_path)

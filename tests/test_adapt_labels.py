"""Adapting every learner to another number of labels than it was trained for: it learns them, or says why not."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from efficientai_toolkit.checkpoint import write_npz
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ModelError
from efficientai_toolkit.learners import LEARNERS, learner_class
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.build import build
from efficientai_toolkit.runs.loaded import load_learner, widen_head
from text_models import settings, write_encoder, write_intents

CLASSIFIERS = [name for name in LEARNERS if learner_class(name).only != "regression"]
CLOUDS = np.array([[3, 0], [-3, 1], [0, 4], [0, -4]], np.float32)
WORDS = ["rose", "oven", "cat", "song"]


def clouds(count: int, each: int = 5) -> tuple[list, list[str]]:
    noise = 0.4 * np.random.default_rng(0).standard_normal((count, each, 2))
    x = (CLOUDS[:count, None] + noise).reshape(-1, 2)
    return x.tolist(), [f"cloud {label}" for label in range(count) for _ in range(each)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(learner, …)`: the checkpoint of a learner for two classes as it is before training."""
    folder = tmp_path_factory.mktemp("made")
    encoder, dataset = write_encoder(folder / "encoder"), write_intents(folder / "mine.csv")

    def make(algorithm: str, **sections) -> Path:
        if learner_class(algorithm).joint:  # trains on the classes of one data set
            data = settings(encoder, dataset, folder, algorithm)
        else:
            data = {
                "meta_learning": {"algorithm": algorithm, "num_inner_steps": 2, "inner_lr": 0.1},
                "task_distribution": {"task_families": ["linear_classification"], "num_train_tasks": 4},
                "model": {"backbone": "mlp", "hidden_dim": 8},
            }
        built = build(MetaLearningConfig.from_dict({**data, **sections}))
        file = folder / f"{algorithm}.npz"
        header = {"learner": built.learner.describe(), "config": built.config.to_dict()}
        write_npz(file, built.learner.state(), header)
        return file

    return make


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("algorithm", CLASSIFIERS)
def test_every_learner_takes_another_number_of_labels_or_says_why_not(made, tmp_path, algorithm, count):
    checkpoint = made(algorithm)
    x, labels = clouds(count)
    if learner_class(algorithm).joint:
        x = [" ".join(["my", *[WORDS[i // 5]] * (i % 5 + 1)]) for i in range(len(labels))]
    if algorithm == "cavia" and count > 1:
        with pytest.raises(ModelError, match=f"trained for 2 classes, and the examples have {count}: .* 'cavia'"):
            adapt_checkpoint(checkpoint, x, labels, num_steps=20)
        return
    adapted = adapt_checkpoint(checkpoint, x, labels, num_steps=20)
    logits = adapted.outputs(x)
    assert logits.shape == (len(labels), count)
    if algorithm != "relation":  # what it compares by is a network, not trained here
        assert [label for label, _ in adapted.predict(x)] == labels
    adapted.save(tmp_path)
    again = AdaptedTask.load(tmp_path)
    for (name, kept), (_, made_first) in zip(tree_flatten(again.fast), tree_flatten(adapted.fast), strict=True):
        assert mx.array_equal(kept, made_first), name
    # To the bit only the arrays: as they were made they may lie otherwise in memory, which a BLAS can tell.
    np.testing.assert_allclose(np.array(again.outputs(x)), np.array(logits), rtol=1e-5, atol=1e-6)


def test_learned_rates_of_a_new_class_are_the_mean_of_the_trained_ones(made):
    learner = load_learner(made("meta_sgd")).learner
    before = {name: np.array(array) for name, array in learner.meta["rule"].items()}
    assert widen_head(learner, 3)
    for name, old in before.items():
        new = np.array(learner.meta["rule"][name])
        if name in ("rate.head.weight", "rate.head.bias"):
            np.testing.assert_allclose(new, np.broadcast_to(old.mean(0), (3, *old.shape[1:])), rtol=1e-6)
        else:
            assert np.array_equal(new, old)
    assert not widen_head(learner, 3)


def test_a_curvature_over_classes_acts_alike_on_every_number_of_them(made):
    learner = load_learner(made("meta_curvature")).learner
    learner.meta["rule"]["out.head.weight"] = mx.array([[1.5, 0.25], [-0.75, 2.0]])
    widen_head(learner, 4)
    new = np.array(learner.meta["rule"]["out.head.weight"])
    np.testing.assert_allclose(new, -0.25 + 2.0 * np.eye(4), atol=1e-6)  # the means: 1.75 on the diagonal, −0.25 off
    assert np.array_equal(np.array(learner.meta["rule"]["in.head.weight"]), np.eye(8))


def test_rates_by_step_are_not_taken_for_rates_by_class(made):
    learner = load_learner(made("lslr")).learner  # two steps, two classes
    learner.meta["rule"]["rate.head.bias"] = mx.array([0.1, 0.2])
    widen_head(learner, 3)
    assert np.array_equal(np.array(learner.meta["rule"]["rate.head.bias"]), np.array([0.1, 0.2], np.float32))


def test_a_head_that_no_step_moves_is_said(made):
    x, labels = clouds(3)
    still = made("anil", learner={"adapts": ["layers"]})
    with pytest.raises(ModelError, match=r"the inner steps of 'anil' \(2 were taken\) have left it so; give 2 labels"):
        adapt_checkpoint(still, x, labels)
    assert adapt_checkpoint(still, *clouds(2)).outputs(x).shape == (15, 2)
    with pytest.raises(ModelError, match=r"of 'reptile' \(0 were taken\)"):
        adapt_checkpoint(made("reptile"), x, labels, num_steps=0)


@pytest.mark.parametrize(
    "adapter", [{"method": "lora", "target_modules": ["head"]}, {"method": "bitfit", "target_modules": ["*"]}]
)
def test_a_head_of_which_a_part_is_frozen_is_said(made, adapter):
    checkpoint = made("fomaml", adapter=adapter)
    with pytest.raises(ModelError, match="frozen at 2 classes, and the examples have 3"):
        adapt_checkpoint(checkpoint, *clouds(3))
    assert adapt_checkpoint(checkpoint, *clouds(2)).labels == ["cloud 0", "cloud 1"]


def test_a_new_adaptation_leaves_no_curve_of_the_one_before(made, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    adapted = adapt_checkpoint(made("fomaml"), *clouds(2))
    adapted.save(mine)
    for folder in (mine, other):
        folder.mkdir(exist_ok=True)
        (folder / "curve.json").write_text("{}")
        adapted.save(folder)
    assert not (mine / "curve.json").exists()
    assert (other / "curve.json").exists()  # no folder of ours before: somebody's own file

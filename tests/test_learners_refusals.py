"""What learners refuse: options that cannot be, labels that have no place, faulty calls; in one sentence each."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from efficientai_toolkit import (
    MLP,
    ConfigurationError,
    MAMLLearner,
    ModelError,
    SimpleClassifier,
    TaskSamplingError,
    cross_entropy_loss,
    learner_class,
)
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.learners.protonet import PrototypicalNetwork
from learner_cases import blobs, sines, singles

SLOTTED = [name for name in LEARNERS if learner_class(name).has_slots]


def make(name: str, **options):
    model = MLP(1, 1, 8) if name == "alpaca" else SimpleClassifier(2, 8, 3)
    return learner_class(name)(model, num_inner_steps=2, compile=False, **options)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("alpaca", "noise", [0, -1]),
        ("baseline++", "num_base_classes", [0, -3, True]),
        ("baseline++", "embedding_dim", [0]),
        ("baseline++", "scale", [0]),
        ("cavia", "num_context", [0]),
        ("imaml", "inner_clip", [0, -1]),
        ("imaml", "strength", [0]),
        ("leo", "finetune_lr", [0, -0.1, math.nan]),
        ("leo", "finetune_steps", [-1]),
        ("leo", "hidden_dim", [0]),
        ("leo", "inner_clip", [-1.0]),
        ("leo", "input_dim", [0]),
        ("leo", "kl_weight", [-1.0]),
        ("leo", "latent_dim", [0, -2]),
        ("maml++", "cosine_iterations", [0, -5, "abc", True]),
        ("maml++", "first_order_iterations", [-1]),
        ("maml++", "lslr", [1]),
        ("maml++", "multi_step_iterations", [-1]),
        ("matching", "reads", [-1]),
        ("proto_maml", "scale", [0, -1]),
        ("protonet", "scale", [0]),
        ("r2d2", "strength", [0, -1]),
        ("relation", "hidden_dim", [0, -1]),
    ],
)
def test_values_that_no_option_can_have(name, option, values):
    for value in values:
        with pytest.raises(ConfigurationError, match=f"option '{option}' should be .*got {value}|{value!r}"):
            make(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options"), [("relation", {}), ("matching", {"full_context": True}), ("baseline++", {})]
)
def test_an_embedding_of_another_size(name, options):
    learner = make(name, embedding_dim=5, **options)
    for call in (learner.meta_train_step, learner.evaluate):
        with pytest.raises(ModelError, match="embedding_dim is 5, and SimpleClassifier gives 8 numbers"):
            call(blobs(2))
    assert math.isfinite(make(name, embedding_dim=8, **options).meta_train_step(blobs(2))["query_loss"])


def test_leo_says_what_it_decodes_for():
    with pytest.raises(TaskSamplingError, match=r"'all' is for regression; for classes use decodes='head'"):
        make("leo", decodes="all").meta_train_step(blobs(2))
    learner = learner_class("leo")(MLP(1, 1, 8), decodes="all", input_dim=7)
    with pytest.raises(ModelError, match=r"pairs .* of 8 numbers, and these have 2; input_dim"):
        learner.evaluate(sines(2))


@pytest.mark.parametrize(
    "arguments", [{"outer_lr": lambda step: 0.1}, {"outer_optimizer": optim.Adam(0.1)}], ids=["schedule", "optimizer"]
)
def test_one_schedule_at_a_time(arguments):
    with pytest.raises(ConfigurationError, match="cosine_iterations is a schedule of its own"):
        learner_class("maml++")(MLP(1, 1, 8), cosine_iterations=10, **arguments)
    assert learner_class("maml++")(MLP(1, 1, 8), **arguments).iteration == 0
    with pytest.raises(ConfigurationError, match="outer_lr must be a positive number"):
        learner_class("maml++")(MLP(1, 1, 8), outer_lr=-1, cosine_iterations=10)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOTTED)
def test_labels_without_a_slot(name):
    """None gives inf or NaN: what cannot be used is refused, in training, evaluation and adaptation."""
    learner, task = make(name), singles(blobs(1))[0]
    before = {path: mx.array(value) for path, value in learner.state().items()}
    for labels in (10 * (task.support_y + 1), -1 - task.support_y):
        moved = task._replace(support_y=labels, query_y=mx.take(labels, 2 * task.query_y))
        calls = [lambda e: learner.adapt(e.support_x, e.support_y), lambda e: learner.evaluate([e])]
        calls += [lambda e: learner.meta_train_step([e]), lambda e: learner.meta_train([e])]
        for call in calls:
            with pytest.raises(TaskSamplingError, match=r"support labels are -?\d+ … -?\d+, (and|but)"):
                call(moved)
    assert all(mx.array_equal(value, before[path]) for path, value in learner.state().items())
    lacking = task._replace(query_y=mx.where(task.query_y == 2, 3, task.query_y))
    with pytest.raises(TaskSamplingError, match=r"query label 3 is not among those of the support, \[0, 1, 2\]"):
        learner.evaluate([lacking])
    assert "step_0_loss" in learner.evaluate([lacking], lambda p, y: cross_entropy_loss(p, mx.minimum(y, 2)))
    if hasattr(learner, "classify"):
        with pytest.raises(TaskSamplingError, match="any kind use classify and train_episodes"):
            learner.adapt(task.support_x, task.support_y + 20)


def test_baseline_pp_trains_on_any_class_of_its_base():
    task = singles(blobs(1))[0]
    far = task._replace(support_y=10 * task.support_y, query_y=10 * task.query_y)
    assert math.isfinite(make("baseline++", num_base_classes=21).meta_train_step([far])["query_loss"])
    with pytest.raises(TaskSamplingError, match="support labels are 0 … 20, but num_base_classes is 20"):
        make("baseline++", num_base_classes=20).meta_train_step([far])


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda n, s, q, y: n.classify(q, s, y[:-1]), "support_x has 6 rows and support_y 5"),
        (lambda n, s, q, y: n.classify(q, s[:0], []), "the support is empty"),
        (lambda n, s, q, y: n.classify(q[:0], s, y), "no query samples"),
        (lambda n, s, q, y: n.classify(q, s, [None, *y[1:]]), "labels are of type object"),
        (lambda n, s, q, y: n.classify(q, s, np.array(y)[:, None]), "labels are 2-dimensional"),
        (lambda n, s, q, y: n.train_episodes([(s, y, q)]), "episode 0 has 3 parts"),
        (lambda n, s, q, y: n.adapt(mx.array(s), mx.zeros((6, 1), mx.int32)), "shape"),
    ],
)
def test_faulty_calls_of_a_metric_learner(call, sentence):
    network = PrototypicalNetwork(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)), compile=False)
    with pytest.raises(TaskSamplingError, match=sentence):
        call(network, np.ones((6, 2), np.float32), np.ones((4, 2), np.float32), ["a", "b", "c"] * 2)


def test_a_support_without_a_target_for_each_example():
    for name in ("maml", "r2d2", "baseline++"):
        with pytest.raises(TaskSamplingError, match="support_x has 4 rows and support_y 3"):
            make(name).adapt(mx.zeros((4, 2)), mx.array([0, 1, 2]))
    with pytest.raises(TaskSamplingError, match="support_x has 0 rows"):
        MAMLLearner(MLP(1, 1, 8)).adapt(mx.zeros((0, 1)), mx.zeros((0, 1)))


def test_alpaca_predicts_from_numpy_arrays():
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    learner = make("alpaca")
    expected = learner.predict_distribution(mx.array(x), mx.array(np.sin(x)), mx.array(x))
    for found, same in zip(learner.predict_distribution(x, np.sin(x), x.tolist()), expected, strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-6)
    with pytest.raises(TaskSamplingError, match="support_x has 5 rows and support_y 4"):
        learner.predict_distribution(x, np.sin(x)[:4], x)


@pytest.mark.parametrize("name", ["relation", "baseline++"])
def test_the_embedding_of_a_frozen_model_is_known(name):
    """As under an adapter, where the head does not train."""
    model = SimpleClassifier(2, 8, 3)
    model.head.freeze()
    options = {"num_base_classes": 3} if name == "baseline++" else {}
    assert math.isfinite(learner_class(name)(model, compile=False, **options).meta_train_step(blobs(2))["query_loss"])

"""Losses of one's own: what they may be, what they must return, and where there is an accuracy beside them."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import pytest

from efficientai_toolkit import (
    MLP,
    ConfigurationError,
    EpisodeStack,
    MAMLLearner,
    SimpleClassifier,
    TaskSamplingError,
    cross_entropy_loss,
    learner_class,
)
from efficientai_toolkit.learners import LEARNERS
from learner_cases import blobs, sines

CLASSIFIERS = [name for name in LEARNERS if learner_class(name).only != "regression"]


def make(name: str, outputs: int = 3, **options):
    return learner_class(name)(SimpleClassifier(2, 8, outputs), inner_lr=0.1, num_inner_steps=2, **options)


def column(stack: EpisodeStack) -> EpisodeStack:
    """Labels (N, 1), as tables have them."""
    return stack._replace(support_y=stack.support_y[..., None], query_y=stack.query_y[..., None])


def flat_cross_entropy(predictions, y):
    return cross_entropy_loss(predictions, y.reshape(-1))


def binary(predictions, y):
    return nn.losses.binary_cross_entropy(predictions, y.astype(mx.float32), reduction="mean")


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 3}])
def test_labels_of_one_column_have_no_accuracy_but_the_same_loss(options):
    stack = blobs(3)
    expected = [make("maml", **options).meta_train_step(stack), make("maml", **options).evaluate(stack, None, (0, 2))]
    learner = make("maml", **options)
    found = [
        learner.meta_train_step(column(stack), flat_cross_entropy),
        make("maml", **options).evaluate(column(stack), flat_cross_entropy, (0, 2)),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        losses = {name: value for name, value in theirs.items() if "acc" not in name}
        assert ours == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("name", ["maml", "reptile", "melpa"])
@pytest.mark.parametrize("queries", [4, 1], ids=["more queries than labels", "as many"])
def test_several_labels_a_row_have_a_loss_and_no_accuracy(name, queries):
    stack = blobs(2, query=queries)
    labels = [(y[..., None] >= mx.arange(3)).astype(mx.int32) for y in (stack.support_y, stack.query_y)]
    several = stack._replace(support_y=labels[0], query_y=labels[1])
    options = {"head_from_means": False, "sequence": 2} if name == "melpa" else {}
    learner = make(name, **options)
    assert "query_accuracy" not in learner.meta_train_step(several, binary)
    assert not [k for k in learner.evaluate(several, binary, (0, 2)) if "acc" in k]


def test_one_logit_a_row_has_a_loss_and_no_accuracy():
    stack = blobs(2, way=2)

    def one_logit(predictions, y):
        return binary(predictions[:, 0], y)

    learner = MAMLLearner(MLP(2, 1, 8), num_inner_steps=2)
    assert "query_accuracy" not in learner.meta_train_step(stack, one_logit)
    assert not [k for k in learner.evaluate(stack, one_logit, (0, 2)) if "acc" in k]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_labels_of_one_column_are_refused_where_no_loss_takes_them(name):
    stack, learner = blobs(2), make(name)
    both, late = column(stack), stack._replace(query_y=stack.query_y[..., None])
    for part, given, shape in (("support", both, (6, 1)), ("query", late, (12, 1))):
        calls = [lambda given=given: learner.evaluate(given)]
        # The joint training of Baseline++ asks for labels, not for those of the support.
        calls += [lambda given=given: learner.meta_train_step(given)]
        for call in calls:
            sentence = re.escape(f"{part} labels have the shape {shape}; expected ({shape[0]},)")
            with pytest.raises(TaskSamplingError, match=sentence):
                call()
    with pytest.raises(TaskSamplingError, match=r"support labels have the shape \(6, 1\); expected \(6,\)"):
        learner.adapt(both.support_x[0], both.support_y[0])


def test_cross_entropy_asks_for_a_class_a_row():
    with pytest.raises(TaskSamplingError, match=r"shape \(4, 3\) and their classes \(4, 1\); expected \(4,\)"):
        cross_entropy_loss(mx.zeros((4, 3)), mx.zeros((4, 1), mx.int32))
    assert cross_entropy_loss(mx.zeros((2, 5, 3)), mx.zeros((2, 5), mx.int32)).item() == pytest.approx(1.0986, abs=1e-4)


class Weighted(nn.Module):
    """A loss with an array of its own, or without: an `nn.Module` has no hash, and one without is an empty mapping."""

    def __init__(self, weight: float | None = None):
        super().__init__()
        if weight is not None:
            self.weight = mx.array(weight)

    def __call__(self, predictions, y):
        return (self.weight if "weight" in self else 3.0) * cross_entropy_loss(predictions, y)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_module_is_a_loss(compiled):
    stack = blobs(2)
    for loss, factor in ((Weighted(2.0), 2), (Weighted(), 3)):
        expected = make("maml", compile=compiled).evaluate(stack, None, (0,))["step_0_loss"]
        learner = make("maml", compile=compiled)
        assert learner.evaluate(stack, loss, (0,))["step_0_loss"] == pytest.approx(factor * expected, rel=1e-6)
        first, again = (learner.meta_train_step(stack, loss)["query_loss"] for _ in range(2))
        assert first != again
        learner.adapt(stack.support_x[0], stack.support_y[0], loss)


def test_losses_without_a_hash_are_not_taken_for_one_another():
    stack, learner = blobs(2), make("maml")
    found = [learner.evaluate(stack, Weighted(1.0 + n), (0,))["step_0_loss"] for n in range(8)]
    assert [value / found[0] for value in found] == pytest.approx([1 + n for n in range(8)], rel=1e-5)


@pytest.mark.parametrize("name", ["maml", "protonet", "baseline++"])
def test_a_loss_that_is_no_number(name):
    def rows(predictions, y):
        return nn.losses.cross_entropy(predictions, y)

    stack, learner = blobs(2), make(name)
    for loss, sentence in ((rows, r"an array of shape \(\d+,\)"), (lambda p, y: None, "None")):
        for call in (learner.meta_train_step, learner.evaluate):
            with pytest.raises(ConfigurationError, match=f"loss_fn returned {sentence}; expected one number"):
                call(stack, loss)
    assert learner.iteration == 0


class Spread(nn.Module):
    """Mean and log variance: two arrays in place of one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def __call__(self, x):
        y = self.layer(x)
        return y[:, :1], y[:, 1:]


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile"])
def test_a_model_of_several_outputs_has_a_loss_of_its_own(name):
    def likelihood(predictions, y):
        mean, log_variance = predictions
        return mx.mean(mx.square(y - mean) * mx.exp(-log_variance) + log_variance)

    learner = learner_class(name)(Spread(), inner_lr=0.01, num_inner_steps=1, chunk=1)
    found = learner.evaluate(sines(2), likelihood, (0, 1))
    assert found["step_1_loss"] < found["step_0_loss"]
    assert "step_1_acc" not in found
    assert learner.meta_train_step(sines(2), likelihood)["query_loss"] > 0

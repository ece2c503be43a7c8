"""Inputs of a shape that the model cannot read are named, wherever a learner is given them."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import (
    MLP,
    Conv4,
    EpisodeStack,
    LoRAConfig,
    ModelError,
    SimpleClassifier,
    TaskSamplingError,
    attach,
    learner_class,
    mse_loss,
)
from efficientai_toolkit.tasks.episode import as_stacks
from learner_cases import blobs, singles

LABELS = mx.array([0, 1, 0, 1])
RIGHT, WRONG = mx.zeros((4, 2)), mx.zeros((4, 3))


def make(name: str, model=None):
    return learner_class(name)(SimpleClassifier(2, 8, 2) if model is None else model, num_inner_steps=1, compile=False)


@pytest.mark.parametrize("name", ["maml", "reptile", "cavia", "protonet", "r2d2", "leo"])
@pytest.mark.parametrize(("support", "query", "part"), [(WRONG, WRONG, "support_x"), (RIGHT, WRONG, "query_x")])
def test_inputs_of_another_width(name, support, query, part):
    learner, episode = make(name), (support, LABELS, query, LABELS)
    calls = [lambda: learner.meta_train_step([episode]), lambda: learner.evaluate([episode])]
    calls += [lambda: learner.adapt(support, LABELS)] if part == "support_x" else []
    sentence = rf"SimpleClassifier cannot read {part} with inputs of shape \(3,\): its first layer takes \(2,\)$"
    for call in calls:
        with pytest.raises(ModelError, match=sentence):
            call()
    assert learner.iteration == 0
    assert learner.meta_train_step([(RIGHT, LABELS, RIGHT, LABELS)])["query_loss"] > 0


def test_inputs_of_another_width_under_an_adapter_and_compiled():
    model = attach(SimpleClassifier(2, 8, 2), LoRAConfig(rank=1), train_head=True)
    learner = learner_class("maml")(model, num_inner_steps=1)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"shape \(3,\): its first layer takes \(2,\)"):
            learner.meta_train_step([(RIGHT, LABELS, WRONG, LABELS)])


def test_targets_of_a_regression():
    with pytest.raises(ModelError, match=r"MLP cannot read support_x with inputs of shape \(3,\): .* takes \(1,\)"):
        make("maml", MLP(1, 1, 8)).adapt(WRONG, mx.zeros((4, 1)))


def test_images_of_another_size():
    model = Conv4(input_shape=(16, 16, 1), num_classes=2, hidden_dim=4)
    with pytest.raises(ModelError, match=r"Conv4 cannot read support_x with inputs of shape \(16, 16, 3\): \[resh"):
        make("maml", model).adapt(mx.zeros((4, 16, 16, 3)), LABELS)


def test_an_error_of_the_loss_stays_its_own():
    def broken(predictions, targets):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        make("maml").meta_train_step([(RIGHT, LABELS, RIGHT, LABELS)], broken)
    with pytest.raises(ValueError, match="broadcast"):
        make("maml").evaluate(
            [(RIGHT, mx.zeros((4, 5)), RIGHT, mx.zeros((4, 5)))], lambda p, y: mx.mean(mx.square(p - y))
        )


@pytest.mark.parametrize(("outputs", "targets"), [(2, (4, 1)), (4, (4,)), (6, (4, 2, 3))])
def test_targets_of_another_size_than_the_outputs(outputs, targets):
    """Broadcast, they would be a loss that nobody asked for."""
    learner, y = make("maml", MLP(2, outputs, 8)), mx.zeros(targets)
    episode = (RIGHT, y, RIGHT, y)
    sentence = re.escape(f"predictions have the shape (4, {outputs}) and their targets {targets}; expected the same")
    for loss_fn in (None, mse_loss):
        for call in (
            lambda loss_fn=loss_fn: learner.meta_train_step([episode], loss_fn),
            lambda loss_fn=loss_fn: learner.evaluate([episode], loss_fn),
            lambda loss_fn=loss_fn: learner.adapt(RIGHT, y, loss_fn),
        ):
            with pytest.raises(TaskSamplingError, match=sentence):
                call()
    assert learner.iteration == 0


@pytest.mark.parametrize("name", ["r2d2", "alpaca"])
def test_targets_of_more_axes_than_a_closed_form_has(name):
    y = mx.zeros((4, 2, 3))
    with pytest.raises(TaskSamplingError, match=r"shape \(4, 6\) and their targets \(4, 2, 3\)"):
        make(name, MLP(2, 6, 8)).meta_train_step([(RIGHT, y, RIGHT, y)])


def test_one_number_is_a_batch_of_one():
    learner, one, more = make("maml", SimpleClassifier(1, 8, 2)), mx.array([0.5]), mx.array([0.1, 0.2])
    episode = (one, mx.array([1]), more, mx.array([0, 1]))
    column = (one[:, None], episode[1], more[:, None], episode[3])
    assert learner.evaluate([episode]) == learner.evaluate([column])
    assert learner.adapt(one, episode[1])(one).shape == (1, 2)


def test_true_and_false_are_classes():
    stack, half = blobs(3), {}
    for kind in (mx.bool_, mx.int32):
        learner = make("maml")
        labels = [(y == 2).astype(kind) for y in (stack.support_y, stack.query_y)]
        both = EpisodeStack(stack.support_x, labels[0], stack.query_x, labels[1])
        adapted = learner.adapt(both.support_x[0], both.support_y[0])(both.query_x[0])
        half[kind] = learner.meta_train_step(both), learner.evaluate(singles(both)), adapted.tolist()
        assert [y.dtype for stack in as_stacks([both]) for y in (stack.support_y, stack.query_y)] == 2 * [mx.int32]
    assert half[mx.bool_] == half[mx.int32]


def test_a_stack_among_episodes_is_its_episodes():
    stack, learner = blobs(4), make("maml", SimpleClassifier(2, 8, 3))
    expected = learner.evaluate_per_task(singles(stack))
    mixed = [EpisodeStack(*(part[:3] for part in stack)), *singles(stack)[3:]]
    found = learner.evaluate_per_task(mixed)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["maml", "protonet", "r2d2", "baseline++"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s._replace(query_y=s.query_y[:, :1]), "query_x has 12 rows and query_y 1; both"),
        (lambda s: s._replace(query_x=s.query_x[:, :5]), "query_x has 5 rows and query_y 12; both"),
        (lambda s: s._replace(query_x=s.query_x[:, :0], query_y=s.query_y[:, :0]), "query_x has 0 rows and query_y 0"),
        (lambda s: s._replace(support_y=s.support_y[:, :1]), "support_x has 6 rows and support_y 1; both"),
        (lambda s: s._replace(query_x=s.query_x[:1], query_y=s.query_y[:1]), "a stack are of 2, 2, 1, 1 tasks; all"),
        (lambda s: EpisodeStack(*(part[:0] for part in s)), "a stack are of 0, 0, 0, 0 tasks; all"),
        (lambda s: s._replace(support_y=mx.array(1)), "a stack are of 2, 0, 2, 2 tasks; all"),
    ],
)
def test_a_stack_of_parts_that_do_not_belong_together(name, change, sentence):
    """Broadcast, they would be numbers that nobody asked for."""
    learner, stack = make(name, SimpleClassifier(2, 8, 3)), change(blobs(2))
    for call in (learner.meta_train_step, learner.evaluate, learner.meta_gradient):
        for given in (stack, [stack], [stack, *singles(blobs(1))]):
            with pytest.raises(TaskSamplingError, match=sentence):
                call(given)
    assert learner.iteration == 0


def test_a_stack_of_numpy_arrays_is_one_of_mlx():
    stack, learner = blobs(2), make("maml", SimpleClassifier(2, 8, 3))
    arrays = EpisodeStack(*(np.array(part) for part in stack))
    assert learner.evaluate(arrays) == learner.evaluate(stack)
    assert learner.meta_train_step(arrays)["query_loss"] > 0

"""Inputs of a shape that the model cannot read are named, wherever a learner is given them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from efficientai_toolkit import (
    MLP,
    Conv4,
    LoRAConfig,
    ModelError,
    SimpleClassifier,
    attach,
    learner_class,
    mse_loss,
)

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
        make("maml").evaluate([(RIGHT, mx.zeros((4, 5)), RIGHT, mx.zeros((4, 5)))], mse_loss)

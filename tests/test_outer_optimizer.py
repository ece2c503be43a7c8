"""One optimiser of MLX for several learners, or one that has been used: each learner starts afresh."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from efficientai_toolkit import MAMLLearner, SimpleClassifier
from learner_cases import blobs

MAKERS = {
    "adam": lambda: optim.Adam(0.01, bias_correction=True),
    "schedule": lambda: optim.Adam(optim.linear_schedule(0.01, 0.0, 10)),
    "momentum": lambda: optim.SGD(0.01, momentum=0.9),
    "adafactor": lambda: optim.Adafactor(0.01),
    "muon": lambda: optim.Muon(0.01),
}


def learner(optimizer, width: int = 8) -> MAMLLearner:
    return MAMLLearner(SimpleClassifier(2, width, 3), num_inner_steps=1, outer_optimizer=optimizer)


def used(optimizer) -> tuple[nn.Module, dict]:
    """The optimiser's own model, of the same names as a learner's, after some steps."""
    model = SimpleClassifier(2, 8, 3)
    grads = model.trainable_parameters()
    for _ in range(3):
        optimizer.update(model, grads)
    mx.eval(model.parameters(), optimizer.state)
    return model, grads


@pytest.mark.parametrize("kind", MAKERS)
def test_a_used_optimiser_begins_anew_in_a_learner(kind, tmp_path):
    fresh, optimizer, stack = MAKERS[kind](), MAKERS[kind](), blobs(2)
    model, grads = used(optimizer)
    one, two = learner(fresh), learner(optimizer)
    assert one.state().keys() == two.state().keys()
    assert all(mx.array_equal(value, two.state()[name]) for name, value in one.state().items())
    assert [one.meta_train_step(stack) for _ in range(2)] == [two.meta_train_step(stack) for _ in range(2)]
    two.save(tmp_path / "learner.npz")
    learner(MAKERS[kind]()).load(tmp_path / "learner.npz")
    # What it was used for goes on where it was.
    other, same_grads = used(own := MAKERS[kind]())
    own.update(other, same_grads)
    optimizer.update(model, grads)
    theirs = dict(tree_flatten(other.parameters()))
    assert all(mx.array_equal(value, theirs[name]) for name, value in tree_flatten(model.parameters()))


def test_two_learners_of_two_sizes_share_an_optimiser():
    optimizer, stack = optim.Adam(0.01), blobs(2)
    optimizer.learning_rate = 0.02  # which is not of its state of before
    learners = [learner(optimizer), learner(optimizer, 16)]
    for one, width in zip(learners, (8, 16), strict=True):
        assert one.meta_train_step(stack) == learner(optim.Adam(0.02), width).meta_train_step(stack)
        assert one.state()["optimizer/step"].item() == 1

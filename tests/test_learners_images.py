"""Every learner for classes takes a step on images, through convolutions, and stays finite."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from efficientai_toolkit import Conv4, EpisodeStack, ModelError, learner_class
from efficientai_toolkit.backbones.conv4 import StridedConv4
from efficientai_toolkit.learners import LEARNERS
from learner_cases import assert_close, singles

REGRESSION = ("alpaca",)
OPTIONS = {"matching": {"full_context": True}, "maml++": {"first_order_iterations": 1}}


def images(tasks: int = 2) -> EpisodeStack:
    x = mx.random.uniform(shape=(tasks, 12, 8, 8, 1), key=mx.random.key(0))
    y = mx.broadcast_to(mx.array([0, 1, 2, 0, 1, 2]), (tasks, 6))
    return EpisodeStack(x[:, :6], y, x[:, 6:], y)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in REGRESSION])
def test_a_step_on_images_is_finite_and_stacks(name):
    def learner(chunk):
        model = Conv4((8, 8, 1), 3, hidden_dim=4, num_layers=2)
        options = {"inner_lr": 0.01, "num_inner_steps": 2, "compile": False, **OPTIONS.get(name, {})}
        return learner_class(name)(model, chunk=chunk, **options)

    stacked, looped = learner(2), learner(1)
    metrics, grads = stacked.meta_gradient(images())
    assert all(math.isfinite(value.item()) for value in metrics.values())
    assert math.isfinite(mx.sqrt(sum(mx.sum(g * g) for g in grads.values())).item())
    alone = looped.meta_gradient(singles(images()))[1]
    # Up to the rounding of arrays whose gradient is nothing but rounding (what a norm makes redundant).
    largest = max(mx.linalg.norm(g).item() for g in grads.values())
    real = [name for name, g in grads.items() if mx.linalg.norm(g).item() > 1e-4 * largest]
    assert_close({n: grads[n] for n in real}, {n: alone[n] for n in real}, 1e-3)
    step = stacked.meta_train_step(images())
    assert all(math.isfinite(value) for value in step.values())
    assert step["param_diff"] > 0


@pytest.mark.parametrize("shape", [(8, 16, 1), (15, 15, 3), (16, 8, 1)])
def test_images_that_four_halvings_leave_nothing_of(shape):
    with pytest.raises(ModelError, match=f"images of {shape[0]} × {shape[1]} are too small for 4 blocks"):
        Conv4(shape, 5, 4)
    assert StridedConv4(shape, 5, 4)(mx.zeros((2, *shape))).shape == (2, 5)
    assert Conv4((16, 16, 1), 5, 4)(mx.zeros((2, 16, 16, 1))).shape == (2, 5)

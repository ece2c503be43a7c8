"""ResNet-12: shapes, DropBlock, and that it stacks and differentiates twice."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import EpisodeStack, MAMLLearner, ModelError, functional, trainable
from efficientai_toolkit.backbones.resnet12 import DropBlock, ResNet12
from learner_cases import assert_close, singles


def images(tasks: int = 2, side: int = 16, channels: int = 3) -> EpisodeStack:
    key = mx.random.key(0)
    x = mx.random.uniform(shape=(tasks, 8, side, side, channels), key=key)
    y = mx.broadcast_to(mx.array([0, 1, 0, 1]), (tasks, 4))
    return EpisodeStack(x[:, :4], y, x[:, 4:], y)


def test_it_is_the_640_wide_network_of_the_field():
    model = ResNet12()
    count = sum(value.size for value in trainable(model).values())
    convolutions = sum(9 * (a * b + 2 * b * b) + a * b + 8 * b for a, b in ((3, 64), (64, 160), (160, 320), (320, 640)))
    assert count == convolutions + 5 * 641
    assert 12.4e6 < count < 12.5e6
    assert model(mx.zeros((2, 32, 32, 3))).shape == (2, 5)
    with pytest.raises(ModelError, match="too small"):
        ResNet12((8, 8, 1))


def test_drop_block_drops_squares_and_keeps_the_mean():
    drop = functional(DropBlock(0.2, 3))
    x = mx.ones((64, 12, 12, 4))
    assert mx.array_equal(drop({}, x), x)
    y = np.array(drop({}, x, key=mx.random.key(1)))
    assert y.mean() == pytest.approx(1, abs=1e-4)
    dropped = y == 0
    assert 0.1 < dropped.mean() < 0.25
    # Every dropped pixel is in a dropped 3 × 3 square.
    windows = np.lib.stride_tricks.sliding_window_view(dropped, (3, 3), axis=(1, 2)).all((-1, -2))
    covered = np.zeros_like(dropped)
    for i in range(3):
        for j in range(3):
            covered[:, i : i + 10, j : j + 10] |= windows
    assert (covered == dropped).all()


def test_stack_equals_loop_in_second_order():
    model = ResNet12((16, 16, 3), 2, widths=(3, 4, 4, 5), dropout=0.0)
    options = {"inner_lr": 0.05, "num_inner_steps": 1, "compile": False}
    stacked = MAMLLearner(model, chunk=2, **options).meta_gradient(images())[1]
    looped = MAMLLearner(model, chunk=1, **options).meta_gradient(singles(images()))[1]
    assert_close(stacked, looped, 1e-4)
    first = MAMLLearner(model, chunk=2, first_order=True, **options).meta_gradient(images())[1]
    name = "model/head.weight"
    assert mx.linalg.norm(first[name] - stacked[name]).item() > 1e-3 * mx.linalg.norm(stacked[name]).item()

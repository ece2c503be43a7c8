"""The bridge from module to function, features and head, layers under transformations."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import Conv4, ModelError, SimpleClassifier, functional, trainable
from efficientai_toolkit.nn.conv import _pool_rows
from efficientai_toolkit.nn.functional import clone, update
from efficientai_toolkit.nn.head import features_of, find_head
from efficientai_toolkit.nn.layers import Dropout, EpisodicBatchNorm, conv2d, max_pool2d
from efficientai_toolkit.nn.losses import cross_entropy_loss, mse_loss


class Listed(nn.Module):
    """Layers in a list, activations between them, no attribute `head`."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_apply_uses_the_given_weights_and_restores_the_models_own():
    model = Listed()
    before = trainable(model)
    x = mx.ones((4, 3))
    y = model(x)
    doubled = {path: 2 * value for path, value in before.items()}
    assert not mx.allclose(functional(model)(doubled, x), y)
    after = trainable(model)
    assert all(after[path] is before[path] for path in before)


def test_apply_restores_when_the_call_raises():
    model = Listed()
    before = trainable(model)
    with pytest.raises(ValueError, match=r"addmm|matmul|shape|dimension"):
        functional(model)({path: value * 0 for path, value in before.items()}, mx.ones((4, 7)))
    assert all(trainable(model)[path] is before[path] for path in before)


def test_apply_takes_a_subset_of_the_parameters():
    model, x = Listed(), mx.ones((4, 3))
    zero_head = {path: mx.zeros_like(v) for path, v in trainable(model).items() if path.startswith("layers.2")}
    assert mx.array_equal(functional(model)(zero_head, x), mx.zeros((4, 2)))


def test_clone_shares_arrays_but_not_containers():
    model = Listed()
    copy = clone(model)
    assert copy.layers[0].weight is model.layers[0].weight
    update(copy, {"layers.0.weight": mx.zeros((8, 3))})
    assert mx.any(model.layers[0].weight != 0)


@pytest.mark.parametrize(("model", "expected"), [(Listed(), "layers.2"), (SimpleClassifier(), "head")])
def test_head_is_found(model, expected):
    assert find_head(model) == expected


def test_features_of_any_module_are_the_input_of_its_head():
    model, x = Listed(), mx.random.normal((4, 3), key=mx.random.key(1))
    features = features_of(model, "layers.2")(trainable(model), x)
    assert mx.allclose(model.layers[2](features), model(x))
    assert isinstance(model.layers[2], nn.Linear)


def test_an_unknown_head_is_refused_with_the_nearest_name():
    with pytest.raises(ModelError, match=r"did you mean 'layers\.2'"):
        find_head(Listed(), "layer.2")
    with pytest.raises(ModelError, match="name the head by its path"):
        find_head(nn.Sequential(nn.ReLU()))


def test_dropout_draws_from_keys_and_is_inactive_without():
    layer = Dropout(0.5)
    x = mx.ones((64, 64))
    call = functional(layer)
    assert mx.array_equal(layer(x), x)
    assert mx.array_equal(call({}, x), x)
    one, same, other = (call({}, x, key=mx.random.key(seed)) for seed in (0, 0, 1))
    assert mx.array_equal(one, same)
    assert not mx.array_equal(one, other)
    assert abs(one.mean().item() - 1) < 0.1
    assert set(np.unique(np.array(one))) == {0.0, 2.0}
    stacked = mx.vmap(lambda key: call({}, x, key=key))(mx.random.split(mx.random.key(0), 2))
    assert not mx.array_equal(stacked[0], stacked[1])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (5, 1, 2)])
def test_conv2d_equals_mlx(kernel, stride, padding):
    x = mx.random.normal((2, 9, 8, 3), key=mx.random.key(0))
    w = mx.random.normal((4, kernel, kernel, 3), key=mx.random.key(1))

    def total(conv):
        return lambda x, w: mx.sum(mx.sin(conv(x, w, stride=stride, padding=padding)))

    assert mx.allclose(conv2d(x, w, stride, padding), mx.conv2d(x, w, stride, padding), atol=1e-5)
    for ours, theirs in zip(
        mx.grad(total(conv2d), argnums=(0, 1))(x, w), mx.grad(total(mx.conv2d), argnums=(0, 1))(x, w), strict=True
    ):
        assert mx.allclose(ours, theirs, atol=2e-5)


def test_max_pool_drops_an_odd_edge_and_sends_ties_to_the_first():
    x = mx.zeros((1, 5, 4, 1))
    assert max_pool2d(x).shape == (1, 2, 2, 1)
    grad = mx.grad(lambda x: mx.sum(max_pool2d(x)))(x)[0, :, :, 0]
    expected = np.zeros((5, 4))
    expected[0:4:2, 0:4:2] = 1
    assert np.array_equal(np.array(grad), expected)


def test_pooled_rows_send_ties_to_the_first_of_a_window():
    """All 81 windows of the values 0, 1, 2: the row blocks of the fused convolution block."""
    windows = np.stack(np.meshgrid(*[np.arange(3)] * 4)).reshape(4, 81, 1)
    y = mx.array(windows.reshape(-1, 1).astype(np.float32))
    (pooled,), (grad,) = mx.vjp(lambda y: _pool_rows(y, 81), [y], [mx.ones((81, 1))])
    assert np.array_equal(np.array(pooled), windows.max(axis=0))
    expected = np.arange(4)[:, None, None] == windows.argmax(axis=0)  # argmax takes the first
    assert np.array_equal(np.array(grad).reshape(4, 81, 1), expected)


def test_batch_norm_normalises_and_keeps_nothing():
    norm = EpisodicBatchNorm(3)
    x = 5 + 2 * mx.random.normal((8, 4, 4, 3), key=mx.random.key(0))
    y = norm(x)
    assert mx.allclose(y.mean(axis=(0, 1, 2)), mx.zeros(3), atol=1e-5)
    assert mx.allclose(y.var(axis=(0, 1, 2)), mx.ones(3), atol=1e-3)
    assert set(trainable(norm)) == {"weight", "bias"}


def test_losses_by_hand():
    logits = mx.array([[2.0, 0.0], [0.0, 1.0]])
    expected = np.mean([np.log(np.exp(2) + 1) - 2, np.log(1 + np.e) - 0])
    assert abs(cross_entropy_loss(logits, mx.array([0, 0])).item() - expected) < 1e-6
    assert mse_loss(mx.array([[1.0], [2.0]]), mx.array([0.0, 4.0])).item() == 2.5
    assert mse_loss(mx.array([1.0, 2.0]), mx.array([[0.0], [4.0]])).item() == 2.5


@pytest.mark.parametrize("label", [2, -1, 1_000_000, 2**32 + 1])
def test_a_label_that_no_logit_has_is_nan_and_writes_nowhere(label):
    logits, targets = mx.array([[2.0, 0.0], [0.0, 1.0]]), mx.array([0, label], dtype=mx.int64)
    assert np.isnan(cross_entropy_loss(logits, targets).item())
    gradient = np.array(mx.grad(cross_entropy_loss)(logits, targets))
    shares = np.array(mx.softmax(logits, axis=-1))
    np.testing.assert_allclose(gradient, (shares - [[1, 0], [0, 0]]) / 2, atol=1e-6)


def test_conv4_sizes():
    assert Conv4((28, 28, 1)).features(mx.zeros((3, 28, 28))).shape == (3, 64)
    assert Conv4((84, 84, 3), hidden_dim=32).features(mx.zeros((2, 84, 84, 3))).shape == (2, 800)

"""The layers whose bias BitFit can train from behind."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from efficientai_toolkit.adapters import adapter_config, attach, merge
from efficientai_toolkit.adapters.attach import slots
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import trainable, update
from efficientai_toolkit.nn.layers import Conv2d, EpisodicBatchNorm


class Gathered(nn.Module):
    """As mlx-lm's experts: a bias a row of indices chooses, and a second argument."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = mx.ones((2, 4, 4)), mx.zeros((2, 4))

    def __call__(self, x, indices):
        return (self.weight[indices] @ x[..., None])[..., 0] + self.bias[indices]


@pytest.mark.parametrize("layer", [nn.RNN(4, 5), nn.LSTM(4, 5), nn.GRU(4, 5), nn.Bilinear(4, 4, 3), Gathered()])
def test_a_bias_inside_a_layer_is_left_alone(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert set(slots(attach(model, adapter_config("bitfit")))) == {"layers.0"}
    with pytest.raises(AdapterError, match="a dense layer, a convolution or a norm with a bias is needed"):
        attach(nn.Sequential(layer), adapter_config("bitfit"))


class Dropped(nn.Linear):
    """A layer with what has no arrays inside it, and options that are not needed."""

    def __init__(self):
        super().__init__(4, 4)
        self.dropout = nn.Dropout(0.0)

    def __call__(self, x, *more, **options):
        return self.dropout(super().__call__(x))


def test_a_user_s_own_layer_is_adapted():
    assert set(slots(attach(nn.Sequential(Dropped()), adapter_config("bitfit")))) == {"layers.0"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (2, 4)),
        (nn.Conv1d(4, 6, 3), (2, 7, 4)),
        (nn.ConvTranspose2d(4, 6, 3), (2, 7, 7, 4)),
        (Conv2d(4, 6, 3), (2, 7, 7, 4)),
        (nn.LayerNorm(4), (2, 4)),
        (nn.GroupNorm(2, 4), (2, 3, 4)),
        (nn.InstanceNorm(4, affine=True), (2, 3, 4)),
        (EpisodicBatchNorm(4), (5, 4)),
        (nn.QuantizedLinear(32, 6, group_size=32), (2, 32)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_a_bias_that_is_added_last_merges(layer, shape):
    model, x = nn.Sequential(layer), mx.random.normal(shape, key=mx.random.key(1))
    plain = model(x)
    attach(model, adapter_config("bitfit"))
    assert mx.allclose(model(x), plain, atol=1e-5)
    update(model, {path: mx.arange(1, 1 + array.size) / 3 for path, array in trainable(model).items()})
    expected = model(x)
    assert mx.allclose(expected - plain, mx.arange(1, 1 + plain.shape[-1]) / 3, atol=1e-5)
    assert mx.allclose(merge(model)(x), expected, atol=1e-5)

"""What merging into a quantised base keeps, and what it is said to lose."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapter_models import quantized_decoder
from efficientai_toolkit.adapters import adapter_config, attach, merge, quantization_loss
from efficientai_toolkit.adapters.quantized import dequantized
from efficientai_toolkit.nn.functional import trainable, update


def test_a_layer_whose_weight_stays_keeps_its_codes():
    model, x = quantized_decoder()
    before = {path: model.layers[0].mlp.up_proj[path] for path in ("weight", "scales", "biases")}
    attach(model, adapter_config("bitfit"))
    update(model, {path: array + 0.1 for path, array in trainable(model).items()})
    expected = model(x[0])
    assert quantization_loss(model) == {}
    merged = merge(model)
    layer = merged.layers[0].mlp.up_proj
    assert type(layer) is nn.QuantizedLinear
    assert all(mx.array_equal(layer[path], array) for path, array in before.items())
    assert mx.allclose(merged(x[0]), expected, atol=1e-5)


def test_a_fresh_adapter_loses_nothing():
    model = attach(quantized_decoder()[0], adapter_config("lora"), "linear")
    assert quantization_loss(model) == {}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_the_loss_is_what_it_is_in_half_precision_too(dtype, size):
    mx.random.seed(1)
    model = nn.Sequential(nn.Linear(256, 256))
    model.apply(lambda weight: weight.astype(dtype))
    nn.quantize(model, group_size=64, bits=4)
    attach(model, adapter_config("lora"), "linear")
    adapter = model.layers[0].adapters["default"]
    adapter.lora_b = size * mx.random.normal(adapter.lora_b.shape, key=mx.random.key(1))
    plain, delta = dequantized(model.layers[0].base).astype(mx.float32), adapter.delta()
    reported = quantization_loss(model)["layers.0"]
    merged = dequantized(merge(model).layers[0]).astype(mx.float32)
    lost = (mx.linalg.norm(merged - (plain + delta)) / mx.linalg.norm(delta)).item()
    assert reported == pytest.approx(lost, rel=1e-3)

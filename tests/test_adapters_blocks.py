"""Adapters on whole blocks: how wide these are, what they are called with, and which modules a kind means."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import pytest

from adapter_models import conv4, decoder, encoder
from efficientai_toolkit.adapters import activate, adapter_config, attach, count_parameters
from efficientai_toolkit.adapters.attach import slots
from efficientai_toolkit.adapters.widths import width_in, width_out
from efficientai_toolkit.errors import AdapterError
from efficientai_toolkit.nn.functional import functional, trainable, update


def perturbed(model):
    update(model, {path: array + 0.1 for path, array in trainable(model).items()})
    return model


class Gated(nn.Module):
    """As mlx-lm makes Llama's: the layer that gives the output is not the last."""

    def __init__(self, dims: int = 8):
        super().__init__()
        self.gate_proj = nn.Linear(dims, 3 * dims, bias=False)
        self.down_proj = nn.Linear(3 * dims, dims, bias=False)
        self.up_proj = nn.Linear(dims, 3 * dims, bias=False)

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Turned(nn.Module):
    """The layers in the reverse of the order in which they are called."""

    def __init__(self):
        super().__init__()
        self.fc2, self.fc1 = nn.Linear(24, 5), nn.Linear(8, 24)

    def __call__(self, x):
        return self.fc2(nn.relu(self.fc1(x)))


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 5)

    def __call__(self, x):
        return self.b(nn.relu(self.a(x)))


@pytest.mark.parametrize(("block", "widths"), [(Gated, (8, 8)), (Turned, (8, 5)), (Unnamed, (8, 5))])
@pytest.mark.parametrize("method", ["parallel", "houlsby", "pfeiffer"])
def test_a_block_is_as_wide_as_what_it_takes_and_gives(block, widths, method):
    mlp, x = block(), mx.random.normal((4, 8))
    assert (width_in(mlp), width_out(mlp)) == widths
    model, plain, config = nn.Sequential(mlp, nn.ReLU()), mlp(x), adapter_config(method, bottleneck=2)
    count = count_parameters(model, config, "layers.0")
    attach(model, config, "layers.0")
    assert sum(array.size for array in trainable(model).values()) == count
    assert mx.abs(model.layers[0](x) - plain).max().item() < 1e-6
    assert perturbed(model)(x).shape == (4, widths[1])


@pytest.mark.parametrize("method", ["houlsby", "parallel", "compacter"])
@pytest.mark.parametrize("make", [decoder, encoder])
def test_a_bottleneck_sits_on_attention(method, make):
    model, (x, *_) = make()
    plain = model(x)
    attach(model, adapter_config(method, bottleneck=4), "attention")
    assert len(slots(model)) == 2
    assert mx.abs(model(x) - plain).max().item() < 1e-5
    grads = mx.grad(lambda p: mx.sum(mx.square(functional(model)(p, x))))(trainable(perturbed(model)))
    assert all(mx.abs(gradient).max().item() > 0 for gradient in grads.values())


def test_a_bottleneck_sits_on_mlx_s_own_attention():
    attention, x = nn.MultiHeadAttention(8, 2), mx.random.normal((2, 5, 8))
    slot = perturbed(attach(nn.Sequential(attention), adapter_config("houlsby", bottleneck=4), "attention")).layers[0]
    h = attention(x, x, x)
    assert mx.allclose(slot(x, x, x), h + slot.adapters["default"].branch(h), atol=1e-5).item()


class Counting(nn.Module):
    """A block that writes to a cache, (a list of) what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def __call__(self, x, mask=None, cache=None):
        cache.append(x)
        return self.layer(x)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5}, {"a": 0.5, "b": 2.0}])
def test_a_weighted_sum_calls_the_block_once(weights):
    model, x = nn.Sequential(Counting()), mx.random.normal((2, 8))
    for name, method in (("a", "houlsby"), ("b", "parallel")):
        perturbed(attach(model, adapter_config(method, bottleneck=4), "layers.0", name=name))
    slot, cache = model.layers[0], []
    activate(model, weights)
    y = slot(x, None, cache=cache)
    assert len(cache) == 1
    h = slot.base.layer(x)
    branches = {"a": slot.adapters["a"].branch(h), "b": slot.adapters["b"].branch(x)}
    assert mx.allclose(y, h + sum(weight * branches[name] for name, weight in weights.items()), atol=1e-5).item()


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}])
@pytest.mark.parametrize("method", ["prefix", "prefix_mlp"])
def test_prefixes_cannot_be_weighted(method, weights):
    """They move the positions of everything, and each would write to a generation's cache."""
    model, (x, *_) = encoder()
    for name, length in (("a", 3), ("b", 10)):
        attach(model, adapter_config(method, length=length), name=name)
    with pytest.raises(AdapterError, match="neither weighted nor added"):
        activate(model, weights)
    activate(model, {"a": 1.0})
    alone = model(x)
    assert mx.array_equal(activate(model, "a")(x), alone).item()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_lengthens_goes_with_adapters_of_other_layers(method):
    model, (x, *_) = encoder()
    attach(model, adapter_config(method, length=3), name="long")
    perturbed(attach(model, adapter_config("lora", rank=4), "linear", name="other"))
    alone, none = (activate(model, names)(x) for names in ("long", {"long": 1.0, "other": 0.0}))
    half, both = (activate(model, {"long": 1.0, "other": weight})(x) for weight in (0.5, 1.0))
    assert mx.allclose(none, alone, atol=1e-6).item()
    assert not mx.allclose(both, alone, atol=1e-3).item()
    assert not mx.allclose(half, both, atol=1e-3).item()
    assert trainable(model).keys() == {*trainable(activate(model, "long")), *trainable(activate(model, "other"))}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_prompt_is_float32_over_a_base_of_half_precision(dtype):
    model, (x, *_) = encoder()
    model.set_dtype(dtype)
    attach(model, adapter_config("prompt", length=4))
    assert {array.dtype for array in trainable(model).values()} == {mx.float32}
    assert model(x).dtype == dtype
    apply, params, optimizer = functional(model), trainable(model), mlx.optimizers.Adam(0.01)
    for _ in range(5):
        grads = mx.grad(lambda p: mx.mean(mx.square(apply(p, x).astype(mx.float32))))(params)
        params = optimizer.apply_gradients(grads, params)
    assert all(mx.isfinite(array).all().item() for array in params.values())


@pytest.mark.parametrize("name", ["lm_head", "head", "embed_out"])
def test_an_output_layer_is_not_one_of_the_linear_layers(name):
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model[name] = nn.Linear(4, 9)
    assert list(slots(attach(model, adapter_config("lora"), "linear"))) == ["first"]


def test_episodic_batch_norms_are_norms():
    model, _ = conv4()
    attach(model, adapter_config("bitfit"), "norm")
    assert list(slots(model)) == ["blocks.0.norm", "blocks.1.norm"]


class Own(nn.Module):
    """A norm of the user's own, whose class says nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = mx.ones((4,)), mx.zeros((4,))

    def __call__(self, x):
        return x * self.weight + self.bias


@pytest.mark.parametrize(("first", "expected"), [(nn.Linear(4, 4), "layers.1.norm"), (nn.LayerNorm(4), "layers.0")])
def test_a_kind_that_nothing_is_of_is_a_name(first, expected):
    model = nn.Sequential(first, nn.Module())
    model.layers[1].norm = Own()
    assert list(slots(attach(model, adapter_config("bitfit"), ["norm"]))) == [expected]

"""The CPU's attention and layer norm against MLX's own, in every order of differentiation and under `vmap`."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit.nn.activations import gelu
from efficientai_toolkit.nn.attention import LayerNorm, RMSNorm, scaled_dot_product_attention, softmax


def arrays(*shapes):
    return [
        mx.random.normal(shape, key=key)
        for shape, key in zip(shapes, mx.random.split(mx.random.key(3), len(shapes)), strict=True)
    ]


def close(a, b, rel=2e-6):
    assert mx.abs(a - b).max().item() <= rel * max(1.0, mx.abs(b).max().item())


def orders(function, x):
    """Outputs, gradient and second-order gradient of a scalar of `function`."""

    def scalar(x):
        return mx.sum(mx.sin(function(x)))

    second = mx.grad(lambda x: mx.sum(mx.square(mx.grad(scalar)(x))))
    return function(x), mx.grad(scalar)(x), second(x)


def test_softmax_is_exact_where_exponents_are_small_and_where_they_are_not():
    x = np.concatenate([np.linspace(-120, 0, 4001), np.full(95, -1e9)]).reshape(8, -1).astype(np.float32)
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True).astype(np.float64))
    expected = e / e.sum(-1, keepdims=True)
    got = np.array(softmax(mx.array(x)))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-37)


def test_masked_scores_leave_no_subnormal_numbers():
    (x,) = arrays((3, 5, 8))
    x = mx.where(mx.arange(8) < 5, x, -1e9)
    for compiled in (softmax, mx.compile(softmax)):
        weights = np.array(compiled(x))
        assert (weights[..., 5:] == 0).all()
        assert (weights[..., :5] > 0).all()
    close(mx.grad(lambda x: mx.sum(mx.square(softmax(x))))(x)[..., 5:], mx.zeros((3, 5, 3)))


def test_the_gradient_of_a_stack():
    (x,) = arrays((3, 5, 7))

    def loss(softmax):
        return lambda x: mx.sum(mx.square(mx.vmap(lambda row: softmax(2 * row), in_axes=1)(x)))

    close(mx.grad(loss(softmax))(x), mx.grad(loss(lambda x: mx.softmax(x, axis=-1)))(x))


def test_softmax_in_every_order():
    (x,) = arrays((3, 5, 7))
    for got, expected in zip(orders(softmax, x), orders(lambda x: mx.softmax(x, axis=-1), x), strict=True):
        close(got, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_every_order_under_vmap_and_compile(masked):
    q, k, v = arrays((2, 3, 4, 6, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8))
    mask = mx.arange(9)[None, None, None] < mx.array([9, 4, 1])[:, None, None, None] if masked else None

    def both(attention):
        def run(q, k, v):
            return mx.concatenate(
                [a.reshape(-1) for a in orders(lambda q: attention(q, k, v, scale=0.3, mask=mask), q)]
                + [a.reshape(-1) for a in orders(lambda k: attention(q, k, v, scale=0.3, mask=mask), k)]
            )

        return mx.compile(mx.vmap(run))(q, k, v)

    close(both(scaled_dot_product_attention), both(mx.fast.scaled_dot_product_attention), 1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_in_every_order(affine):
    x, weight, bias = arrays((2, 5, 16), (16,), (16,))
    ours, mlx = LayerNorm(16, affine=affine), nn.LayerNorm(16, affine=affine)
    if affine:
        for norm in (ours, mlx):
            norm.weight, norm.bias = weight, bias
    for got, expected in zip(orders(mx.vmap(ours), 3 * x + 5), orders(mx.vmap(mlx), 3 * x + 5), strict=True):
        close(got, expected, 2e-5)


@pytest.mark.parametrize("function", [gelu, LayerNorm(6)])
def test_the_gradient_of_what_all_tasks_share_has_its_shape(function):
    """At the first inner step the weights are not stacked, only what comes from the tasks is."""
    shared, tasks = arrays((3, 6), (4, 3, 6))

    def inner(w, t):
        return mx.sum(mx.square(mx.grad(lambda w: mx.sum(function(w) * t))(w)))

    stacked = mx.compile(mx.grad(lambda w: mx.sum(mx.vmap(lambda t: inner(w, t))(tasks))))(shared)
    looped = mx.grad(lambda w: mx.sum(mx.stack([inner(w, t) for t in tasks])))(shared)
    assert stacked.shape == shared.shape
    close(stacked, looped, 1e-5)


def test_layer_norm_in_third_order():
    (x,) = arrays((2, 5, 16))

    def third(norm):
        gradient = mx.grad(lambda x: mx.sum(mx.sin(norm(x))))
        curved = mx.grad(lambda x: mx.sum(mx.square(gradient(x))))
        return mx.grad(lambda x: mx.sum(mx.square(curved(x))))(x)

    close(third(LayerNorm(16)), third(nn.LayerNorm(16)), 1e-4)


@pytest.mark.parametrize("function", [gelu, LayerNorm(128)])
def test_second_order_keeps_an_input_and_a_cotangent(function, peak_bytes):
    """Of each application two arrays, and no derivative: 2.9 with what is at work, where it was 4.9 and 6.1."""
    depth, (x, cotangent, weight) = 32, arrays((256, 128), (256, 128), (128, 128))
    weight = weight / 128**0.5

    def gradient(x, cotangent, weight):
        def chain(x):
            for _ in range(depth):
                x = function(x @ weight)
            return x

        return mx.vjp(chain, [x], [cotangent])[1][0]

    @mx.compile
    def second(x, cotangent, weight):
        return mx.vjp(lambda x, c: gradient(x, c, weight), [x, cotangent], [cotangent])[1]

    mx.eval(x, cotangent, weight)
    assert peak_bytes(lambda: mx.eval(second(x, cotangent, weight))) / x.nbytes / depth < 3.5


def test_attention_of_other_types_is_left_to_mlx():
    x = arrays((2, 3, 4, 8))[0].astype(mx.float16)
    assert scaled_dot_product_attention(x, x, x, scale=1.0).dtype == mx.float16


HALVES = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
NORMS = pytest.mark.parametrize("norm", [LayerNorm(768), LayerNorm(768, affine=False), RMSNorm(768)], ids=repr)


@NORMS
def test_float16_norms_have_the_gradients_of_float32_beside_an_outlier(norm):
    (x,) = arrays((3, 4, 768))
    x = (3 * x).astype(mx.float16)
    x[:, 0, 7] = 300.0  # whose square is more than float16 holds

    def loss(x):
        return mx.sum(mx.sin(norm(x).astype(mx.float32)))

    def curved(x):
        return mx.sum(mx.square(mx.grad(loss)(x).astype(mx.float32)))

    for function in (mx.grad(loss), mx.grad(curved)):
        got, expected = mx.vmap(function)(x), mx.vmap(function)(x.astype(mx.float32))
        assert got.dtype == mx.float16
        error = mx.linalg.norm(got.astype(mx.float32) - expected, axis=-1)
        assert mx.all(error <= 1e-2 * mx.linalg.norm(expected, axis=-1)).item()


@NORMS
@HALVES
def test_mlx_norms_are_not_given_float16_and_the_dtype_stays(norm, dtype, monkeypatch):
    """On a GPU their gradient of a gradient sums squares in the dtype that they are given."""
    given, name = [], "rms_norm" if isinstance(norm, RMSNorm) else "layer_norm"
    mlx = getattr(mx.fast, name)
    monkeypatch.setattr(mx.fast, name, lambda x, *rest: given.append(x.dtype) or mlx(x, *rest))
    x = mx.ones((2, 768), dtype)
    assert norm(x).dtype == mx.result_type(x, *norm.values())
    norm.set_dtype(dtype)
    assert norm(x).dtype == dtype
    norm.set_dtype(mx.float32)
    assert given == 2 * [mx.float32 if dtype == mx.float16 else dtype]

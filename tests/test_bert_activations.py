"""The written-out activations equal their definitions in value and in three orders of derivative, and stack."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit.nn.activations import ACTIVATIONS, gelu, normal_cdf, normal_pdf, relu

X = np.linspace(-9, 9, 7201).astype(np.float32)
PHI = np.array([0.5 * math.erfc(-x / 2**0.5) for x in X.astype(np.float64)])
DENSITY = np.exp(-(X.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)


def derivative(f, order):
    for _ in range(order):
        f = (lambda g: mx.grad(lambda x: mx.sum(g(x))))(f)
    return np.array(f(mx.array(X)))


def test_the_normal_distribution():
    assert np.abs(np.array(normal_cdf(mx.array(X))) - PHI).max() < 2e-7
    assert np.abs(np.array(normal_pdf(mx.array(X))) - DENSITY).max() < 1e-7


@pytest.mark.parametrize(
    ("order", "expected", "tolerance"),
    [
        (0, X * PHI, 1.5e-6),
        (1, PHI + X * DENSITY, 1e-6),
        (2, DENSITY * (2 - X.astype(np.float64) ** 2), 3e-6),
        (3, DENSITY * (X.astype(np.float64) ** 3 - 4 * X), 3e-5),
    ],
)
def test_gelu_and_its_derivatives(order, expected, tolerance):
    assert np.abs(derivative(gelu, order) - expected).max() < tolerance


@pytest.mark.parametrize("x", [0.0, 1e-30, -1e-30, -1e-20, 1e-19, -3e-10, 50.0, -50.0, 1e4, -1e4, 6e4, -6e4])
def test_gelu_and_relu_far_from_and_close_to_zero(x):
    for f, slope in ((gelu, 0.5), (relu, float(x > 0))):
        value, derivative = mx.value_and_grad(f)(mx.array(x))
        expected = (max(x, 0), float(x > 0)) if abs(x) >= 50 else (slope * x, slope)
        assert value.item() == pytest.approx(expected[0], rel=1e-6, abs=1e-9)
        if f is gelu or abs(x) > 1e-20:  # below, the step of `relu` is not yet one
            assert derivative.item() == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("gelu", nn.gelu), ("gelu_tanh", nn.gelu_approx), ("relu", nn.relu), ("silu", nn.silu), ("tanh", mx.tanh)],
)
def test_equal_to_mlx_and_under_captured_gradients(name, reference):
    f = ACTIVATIONS[name]
    assert np.abs(derivative(f, 0) - derivative(reference, 0)).max() < 2e-6
    assert np.abs(derivative(f, 1) - derivative(reference, 1)).max() < 2e-6
    weight = mx.random.normal((4, 4), key=mx.random.key(0))
    x, p = mx.random.normal((3, 2, 4), key=mx.random.key(1)), mx.random.normal((3, 4, 4), key=mx.random.key(2))

    def meta(p, x):  # x goes into the inner gradient by closure
        def loss(p):
            return mx.mean(mx.square(f(x @ weight) @ p))

        return loss(p - 0.1 * mx.grad(loss)(p))

    stacked = mx.vmap(mx.grad(meta))(p, x)
    for i in range(3):
        assert mx.abs(stacked[i] - mx.grad(meta)(p[i], x[i])).max().item() < 1e-5


def test_half_precision_keeps_its_type():
    x = mx.array(X).astype(mx.bfloat16)
    assert gelu(x).dtype == mx.bfloat16
    assert mx.abs(gelu(x).astype(mx.float32) - gelu(x.astype(mx.float32))).max().item() < 0.05

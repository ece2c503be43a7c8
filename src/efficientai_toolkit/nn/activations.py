"""Activation functions, written out so that they go with every nesting of `vmap` and `grad`, and a fast GELU.

`mlx.nn`'s are compiled functions: under `vmap` a compiled function fails ("[Compiled] Cannot vmap primitive") on what
the closure of an inner gradient captures, as it does where frozen layers lie below an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .conv import custom_function
from .elementwise import positive

# Minimax fits in t = x², relative to float32's rounding: Φ(x) = ½ + x P(t) / Q(t) on |x| ≤ 5.6, |error| < 2e-7;
# φ(x) = P(t) / Q(t) on |x| ≤ 6, |error| < 1e-7. `mx.erf` and `mx.exp` run element by element on a CPU: eight times
# the time of these, and three times that of the matmul that feeds the GELU of a small encoder.
_CDF = (
    (0.398942225, 0.0343557826, 0.00470589333, 0.000173624786, 6.35325915e-06, 2.21510323e-08),
    (1.0, 0.252782925, 0.0289281309, 0.00191172273, 7.50199682e-05, 1.18013289e-06),
)
_PDF = (
    (0.398942309, -0.0498807848, 0.00239869188, -5.23279211e-05, 4.34714062e-07),
    (1.0, 0.37496963, 0.0684867156, 0.00809419837, 0.000676089442, 4.78861077e-05, 1.51823008e-06, 1.4739621e-07),
)


def _polynomial(coefficients: tuple[float, ...], t: mx.array) -> Any:
    value: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = value * t + c
    return value


def normal_cdf(x: mx.array) -> Any:
    """Φ(x) of the standard normal, to 2e-7; float32, and not to be differentiated."""
    y = mx.clip(x.astype(mx.float32), -5.6, 5.6)
    t = y * y
    return 0.5 + y * (_polynomial(_CDF[0], t) / _polynomial(_CDF[1], t))


def normal_pdf(x: mx.array) -> Any:
    """φ(x) of the standard normal, to 1e-7; float32, and not to be differentiated."""
    y = mx.clip(x.astype(mx.float32), -6, 6)
    t = y * y
    return _polynomial(_PDF[0], t) / _polynomial(_PDF[1], t)


# Each derivative is a function of x alone, so that x is all that is kept for the way back, in every order.
@custom_function
def gelu(x):
    """x Φ(x)"""
    return (x * normal_cdf(x)).astype(x.dtype)


@custom_function
def _first(x):
    return (normal_cdf(x) + x * normal_pdf(x)).astype(x.dtype)


@custom_function
def _second(x):
    return ((2 - x * x) * normal_pdf(x)).astype(x.dtype)


@gelu.vjp
def _(x, cotangent, _output):
    return cotangent * _first(x)


@_first.vjp
def _(x, cotangent, _output):
    return cotangent * _second(x)


@_second.vjp
def _(x, cotangent, output):
    return cotangent * (-x * output - (2 * x * normal_pdf(x)).astype(x.dtype))


for _function in (gelu, _first, _second):  # without a rule MLX stacks, and then differentiates, the body
    _function.vmap(lambda x, axis, function=_function: (function(x), axis))


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU: ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))"""
    return x * (1 + mx.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))) / 2


def relu(x: mx.array) -> mx.array:
    """x where it is positive, else 0; the derivative at 0 is 0."""
    return x * positive(mx.stop_gradient(x))


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
    "tanh": mx.tanh,
}

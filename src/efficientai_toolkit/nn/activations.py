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
from .elementwise import cut, polynomial, positive, stacks

# Minimax fits P / Q: of φ(x) in x² on all reals, to 2e-8; and of Mills' ratio (1 − Φ(a)) / φ(a) on a ≥ 0, whose product
# with φ is right to 1e-7.
#
# `mx.erf` and `mx.exp` run element by element on a CPU: several times the time of the matmul that feeds the GELU of a
# small encoder. Hence no clamps, see `elementwise.py`.
_PDF = (
    (0.398942262, -0.0422833042, 0.00168781446, -2.97793062e-05, 1.93621471e-07),
    (1.0, 0.394009883, 0.0762441995, 0.00961200367, 0.00089892957, 5.88838759e-05, 4.68436463e-06, 3.25808732e-08,
     1.47942319e-08),
)  # fmt: skip
_MILLS = (
    (1.25331437, 0.54868415, 0.104118094),
    (1.0, 1.23568353, 0.568877854, 0.102523748),
)


def _density(t: mx.array) -> Any:
    """φ(x), from x²"""
    return cut(polynomial(_PDF[0], t) / polynomial(_PDF[1], t))


def _tail(a: Any, density: Any) -> Any:
    """1 − Φ(a) for a ≥ 0"""
    return density * (polynomial(_MILLS[0], a) / polynomial(_MILLS[1], a))


def _cdf(x: mx.array, density: Any) -> Any:
    a: Any = mx.abs(x)
    return 0.5 + x / (a + 1e-18) * (0.5 - _tail(a, density))


def normal_cdf(x: mx.array) -> Any:
    """Φ(x) of the standard normal, to 2e-7; float32, |x| as in `gelu`, not to be differentiated."""
    x = x.astype(mx.float32)
    return _cdf(x, _density(x * x))


def normal_pdf(x: mx.array) -> Any:
    """φ(x) of the standard normal, to 1e-7; float32, |x| as in `gelu`, not to be differentiated."""
    x = x.astype(mx.float32)
    return _density(x * x)


# What is kept for the way back is x and the cotangents: a derivative is computed anew for every cotangent. As functions
# of x alone two of the same would be one to `mx.compile`, which would keep it all the way between them; `mx.depends`,
# which could part them, has no `vmap`.
def _anew(x: mx.array, cotangent: mx.array) -> tuple[Any, Any]:
    """x twice, for two fused kernels, in float32."""
    x = x.astype(mx.float32)
    return x + 0 * cotangent, x - cotangent * 0


@custom_function
def gelu(x):
    """x Φ(x), and up to five derivatives; for |x| up to 60,000, beyond which the powers of x² in it overflow."""
    y = x.astype(mx.float32)
    a = mx.abs(y)
    return (0.5 * (y + a) - a * _tail(a, _density(y * y))).astype(x.dtype)


@custom_function
def _first(x, cotangent):
    """cotangent · gelu′(x)"""
    y, again = _anew(x, cotangent)
    density = _density(y * y)
    return cotangent * cut(_cdf(again, density) + again * density).astype(x.dtype)


@custom_function
def _second(x, cotangent):
    """cotangent · gelu″(x)"""
    y, again = _anew(x, cotangent)
    return cotangent * ((2 - again * again) * _density(y * y)).astype(x.dtype)


@gelu.vjp
def _(x, cotangent, _output):
    return _first(x, cotangent)


@_first.vjp
def _(primals, cotangent, _output):
    x, inner = primals
    return _second(x, cotangent * inner), _first(x, cotangent)


@_second.vjp
def _(primals, cotangent, _output):
    x, inner = primals
    y = x.astype(mx.float32)
    third = (-y * (4 - y * y) * normal_pdf(y)).astype(x.dtype)
    return cotangent * inner * third, _second(x, cotangent)


for _function in (gelu, _first, _second):
    stacks(_function)


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

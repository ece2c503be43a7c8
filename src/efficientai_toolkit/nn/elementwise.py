"""Element-wise functions as the fused kernels of MLX's CPU backend like them.

A C++ compiler makes vector instructions of sums, products, quotients and absolute values; one `mx.where`, `mx.minimum`,
comparison or `mx.sqrt` among them, and the whole kernel runs element by element, at a quarter of the speed or less.

Beside a stacked array, `mx.vmap` gives a scalar the stack's number of axes. A fused kernel of the CPU backend then no
longer sees a scalar and takes its strided form, which on 25 tasks' weights costs ten times the arithmetic: a sixth of
a MAML step of a small network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from ..precision import widened
from .conv import custom_function


@lru_cache(maxsize=256)
def scaling(factor: float) -> Any:
    """x ↦ `factor` · x, to be differentiated to any order."""

    @custom_function
    def scale(x):
        return factor * x

    @scale.vjp
    def _(_x, cotangent, _output):
        return scale(cotangent)

    @scale.vmap
    def _(x, axis):
        return factor * x, axis

    return scale


def stacks(function: Any) -> None:
    """Give an element-wise custom function of one or more arrays of one rank its rule for `mx.vmap`.

    Without one MLX stacks the function's body, and then differentiates that.
    """

    @function.vmap
    def _(inputs, axes):
        if isinstance(inputs, mx.array):
            return function(inputs), axes
        size = next(a.shape[i] for a, i in zip(inputs, axes, strict=True) if i is not None and i >= 0)
        # What is not stacked is repeated, since a gradient has the shape of what the function was given.
        repeated = (
            mx.moveaxis(a, i, 0) if i is not None and i >= 0 else mx.broadcast_to(a, (size, *a.shape))
            for a, i in zip(inputs, axes, strict=True)
        )
        return function(*repeated), 0


def cut(x: mx.array) -> mx.array:
    """x, where a CPU's fused kernel ends, as it takes no reshape; by itself it ends at a depth of eleven operations."""
    if mx.default_device() != mx.cpu:
        return x
    return x.reshape(-1).reshape(x.shape)


def polynomial(coefficients: Sequence[float], t: Any) -> Any:
    """Σ cₖ tᵏ by Estrin's scheme, which is less deep than Horner's."""
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:
        pairs = [low + high * t for low, high in zip(terms[::2], terms[1::2], strict=False)]
        terms, t = pairs + terms[2 * len(pairs) :], t * t
    return terms[0]


def positive(x):
    """1 where x > 0, else 0, in the dtype of x; not to be differentiated. NaN beyond 1.7e38, where the sum is inf."""
    if x.dtype != mx.float32 or mx.default_device() != mx.cpu:
        return (x > 0).astype(x.dtype)
    doubled = x + mx.abs(x)
    return doubled / (doubled + 1e-30)


@custom_function
def add_scaled(x, factor, y):
    """x + `factor` · y, of one shape, for a learned number `factor`, (); to be differentiated to any order. As x, of
    half precision too.
    """
    return (x + factor * y).astype(x.dtype)


@add_scaled.vjp
def _(primals, cotangent, _output):
    _x, factor, y = primals
    # As a matrix product, half of the time of a sum of products on a CPU.
    slope = (widened(cotangent).reshape(1, -1) @ widened(y).reshape(-1, 1)).reshape(())
    return cotangent, slope.astype(factor.dtype), (factor * cotangent).astype(y.dtype)


@add_scaled.vmap
def _(inputs, axes):
    stacked = [axis is not None and axis >= 0 for axis in axes]
    count = next(a.shape[axis] for a, axis, own in zip(inputs, axes, stacked, strict=True) if own)
    x, factor, y = (mx.moveaxis(a, axis, 0) if own else a for a, axis, own in zip(inputs, axes, stacked, strict=True))
    x, y = (a if own else mx.broadcast_to(a, (count, *a.shape)) for a, own in ((x, stacked[0]), (y, stacked[2])))
    if stacked[1]:
        return (x + factor.reshape(count, *(1 for _ in y.shape[1:])) * y).astype(x.dtype), 0
    return add_scaled(x, factor, y), 0

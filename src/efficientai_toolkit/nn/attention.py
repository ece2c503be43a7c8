"""Attention, layer norm and dense layers as few passes over memory on a CPU, with gradients of every order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .conv import custom_function
from .elementwise import cut, polynomial

# ln 2 in two parts, the first short enough for n · part to be exact (Cody & Waite 1980).
_LN2 = (0.693145751953125, 1.42860682030941723212e-6)
_EXP = (1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720)
_ROUND = 1.5 * 2**23  # a float32 of this size has no fraction: adding it rounds to whole numbers
_MASKED = -1e9


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None
) -> mx.array:
    """softmax(scale · q kᵀ) v; q (N, heads, L, d), k and v (N, heads, K, d), mask True where attended.

    On a GPU it is MLX's own. On a CPU MLX's spends most of its time in `mx.exp`, element by element.
    """
    if mx.default_device() != mx.cpu or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, _MASKED)
    return softmax(scores) @ v


@custom_function
def softmax(x: mx.array) -> mx.array:
    """Over the last axis, float32, to 5e-7 relative."""
    e = _exp(x - mx.max(x, axis=-1, keepdims=True))
    return e * (1 / mx.sum(e, axis=-1, keepdims=True))


@softmax.vjp
def _(_x, cotangent, output):
    weighted = cotangent * output
    return weighted - output * mx.sum(weighted, axis=-1, keepdims=True)


@softmax.vmap
def _(x, axis):
    # Without a rule MLX stacks the body instead, whose reading of bits as a float has no gradient.
    return softmax(mx.moveaxis(x, axis, 0)), 0


def _exp(x: mx.array) -> mx.array:
    """eˣ for x ≤ 0 in float32, to 3e-7 relative: 2ⁿ by its exponent bits, the rest by Taylor on |r| ≤ ln 2 / 2."""
    x = cut(mx.maximum(x, -87.0))
    n = (x * 1.4426950408889634 + _ROUND) - _ROUND
    r = (x - n * _LN2[0]) - n * _LN2[1]
    return polynomial(_EXP, r) * mx.view(mx.left_shift(n.astype(mx.int32) + 127, 23), mx.float32)


class Projection(nn.Linear):
    """`mlx.nn.Linear`; on a CPU a product and a sum, since `mx.addmm` first copies the bias to every row."""

    def __call__(self, x: mx.array) -> mx.array:
        if mx.default_device() != mx.cpu or x.dtype != mx.float32 or "bias" not in self:
            return super().__call__(x)
        return x @ self.weight.T + self.bias


class LayerNorm(nn.LayerNorm):
    """`mlx.nn.LayerNorm`; on a CPU its means are products with a column of ones, eight times as fast as `mx.mean`."""

    def __call__(self, x: mx.array) -> mx.array:
        if mx.default_device() != mx.cpu or x.dtype != mx.float32:
            return super().__call__(x)
        y = _normaliser(self.eps)(x)
        y = y * self.weight if "weight" in self else y
        return y + self.bias if "bias" in self else y


@lru_cache(maxsize=16)
def _normaliser(eps: float) -> Any:
    """x ↦ (x − mean) / deviation over the last axis, to be differentiated to any order."""

    def moments(x: mx.array) -> tuple[mx.array, mx.array]:
        average = _average(x)
        centred = x - x @ average
        inverse: Any = mx.rsqrt(mx.square(centred) @ average + eps)
        return centred, cut(inverse)  # or a square root would be taken for every element

    @custom_function
    def normalise(x):
        centred, inverse = moments(x)
        return centred * inverse

    @normalise.vjp
    def _(x, cotangent, output):
        average, (_, inverse) = _average(x), moments(x)
        along = (cotangent * output) @ average
        return inverse * (cotangent - cotangent @ average - output * along)

    @normalise.vmap
    def _(x, axis):
        return normalise(mx.moveaxis(x, axis, 0)), 0

    return normalise


def _average(x: mx.array) -> mx.array:
    return mx.full((x.shape[-1], 1), 1 / x.shape[-1])

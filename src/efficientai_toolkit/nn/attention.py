"""Attention, norms and dense layers as few passes over memory on a CPU, with gradients of every order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .conv import custom_function
from .elementwise import cut, polynomial, stacks

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
    """eˣ for x ≤ 0 in float32, to 3e-7 relative: 2ⁿ by its exponent bits, the rest by Taylor on |r| ≤ ln 2 / 2.

    At −87.7 and below it is 0: subnormal numbers, which masked scores would else give, make the matrix products behind
    them twelve times slower on Intel's processors.
    """
    x = cut(mx.maximum(x, -88.0))  # n = −127, whose bits are those of 0
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
    """`mlx.nn.LayerNorm`; on a CPU in few passes, and little is kept for the way back. Of float16 as `RMSNorm` is."""

    def __call__(self, x: mx.array) -> mx.array:
        if mx.default_device() != mx.cpu or x.dtype != mx.float32:
            return super().__call__(_unbounded(x)).astype(mx.result_type(x, *self.values()))
        y, _ = _normaliser(self.eps)(x)
        y = y * self.weight if "weight" in self else y
        return y + self.bias if "bias" in self else y


class RMSNorm(nn.RMSNorm):
    """`mlx.nn.RMSNorm` in float32, also of float16; the result has the dtype that MLX's would have.

    On a GPU the gradient of MLX's norms, where it is stacked or differentiated again, sums squares in the dtype of x:
    in float16 an activation of 256 makes them infinite, and the gradient 0.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(_unbounded(x)).astype(mx.result_type(x, self.weight))


def _unbounded(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if x.dtype == mx.float16 else x


@lru_cache(maxsize=16)
def _normaliser(eps: float) -> Any:
    """x ↦ (y, i): y = (x − mean) · i over the last axis, i = 1 / deviation; to be differentiated to any order.

    What is kept for the way back is y, the number i of each row, and the cotangents, but not x.
    """

    @custom_function
    def normalise(x):
        centred = x - _across(_mean(x), x)
        inverse: Any = mx.rsqrt(_mean(mx.square(centred)) + eps)
        inverse = cut(inverse)  # or a square root would be taken for every element
        return centred * _across(inverse, x), inverse

    @normalise.vjp
    def _(x, cotangents, outputs):
        (y, inverse), (of_y, of_inverse) = outputs, cotangents
        return _pulled_back(of_y, y, inverse, inverse * of_inverse / x.shape[-1])

    @normalise.vmap
    def _(x, axis):
        return normalise(mx.moveaxis(x, axis, 0)), (0, 0)

    return normalise


@custom_function
def _pulled_back(c: mx.array, y: mx.array, inverse: mx.array, more: mx.array) -> mx.array:
    """i · (c − mean(c) − y · (mean(c · y) + more)): the gradient for x, of cotangents c for y, n · more / i for i."""
    mean = _mean(c)
    own = inverse + 0 * mean  # or `mx.compile` would keep what is made of i for one cotangent until the next
    return _across(own, y) * (c - _across(mean, y) - y * _across(_mean(c * y) + more, y))


@_pulled_back.vjp
def _(primals, cotangent, _output):
    c, y, inverse, more = primals
    n, along, back = c.shape[-1], _mean(c * y) + more, _mean(cotangent * y)
    of_y = -cotangent * _across(inverse * along, y) - c * _across(inverse * back, y)
    of_inverse = n * (_mean(cotangent * c) - _mean(cotangent) * _mean(c) - back * along)
    of_c = _pulled_back(cotangent, y, inverse, mx.zeros_like(more))
    return of_c, of_y, of_inverse, -n * inverse * back


stacks(_pulled_back)


def _mean(x: mx.array) -> mx.array:
    """Over the last axis, which stays, as a product: eight times as fast on a CPU as `mx.mean`."""
    return x @ mx.full((x.shape[-1], 1), 1 / x.shape[-1])


def _across(rows: mx.array, like: mx.array) -> mx.array:
    """A number a row, (…, 1), along the rows of `like`, as a product: a fused kernel that broadcasts is slower."""
    return rows @ mx.ones((1, like.shape[-1]))

"""Layers that behave under every MLX transformation: `vmap` over tasks, second order, `compile`.

`mx.conv2d`'s weight gradient and overlapping pooling have no `vmap` rule, and MLX's batch norm and dropout keep
state or draw from a global generator; these have none of that.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from .functional import next_key


def conv2d(x: mx.array, weight: mx.array, stride: int = 1, padding: int = 0) -> mx.array:
    """Convolution of `x` (N, H, W, C) with `weight` (O, kh, kw, C) as shifted slices and one matmul.

    Equal to `mx.conv2d` up to rounding, with a `vmap` rule for every order of gradient.
    """
    out_channels, kh, kw, channels = weight.shape
    if padding:
        x = mx.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    shifts = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    columns = shifts[0] if len(shifts) == 1 else mx.concatenate(shifts, axis=-1)
    return columns @ weight.reshape(out_channels, kh * kw * channels).T


def max_pool2d(x: mx.array) -> mx.array:
    """2 × 2 max pooling, stride 2, of `x` (N, H, W, C); an odd last row or column is dropped.

    Where values tie, the gradient goes to the first of them in row-major order, as in PyTorch.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    left, right = x[:, :, 0::2], x[:, :, 1::2]
    x = mx.where(left >= right, left, right)
    top, bottom = x[:, 0::2], x[:, 1::2]
    return mx.where(top >= bottom, top, bottom)


class Conv2d(nn.Module):
    """`mlx.nn.Conv2d` (square kernel) that stacks: weight (O, k, k, C), NHWC."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        bound = math.sqrt(1 / (in_channels * kernel_size**2))
        self.weight = mx.random.uniform(-bound, bound, (out_channels, kernel_size, kernel_size, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self.stride, self.padding = stride, padding

    def __call__(self, x: mx.array) -> mx.array:
        y = conv2d(x, self.weight, self.stride, self.padding)
        return y + self.bias if "bias" in self else y


class EpisodicBatchNorm(nn.Module):
    """Batch norm with the statistics of the batch it is given, and no memory: the transductive setting of MAML.

    Normalises `x` (..., C) over every axis but the last, with the biased variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.weight = mx.ones((num_features,))
        self.bias = mx.zeros((num_features,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        axes = tuple(range(x.ndim - 1))
        mean = mx.mean(x, axis=axes)
        centred = x - mean
        variance = mx.mean(mx.square(centred), axis=axes)
        return centred * (mx.rsqrt(variance + self.eps) * self.weight) + self.bias


class Dropout(nn.Module):
    """Dropout that draws from the key of the enclosing `functional(model)(…, key=key)`; inactive without one.

    `mlx.nn.Dropout` gives every task of a `vmap` the same mask; a key per task gives each its own.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout probability must be in [0, 1), got {p}")
        self.p = p

    def __call__(self, x: mx.array) -> mx.array:
        key = next_key() if self.p > 0 else None
        if key is None:
            return x
        return x * mx.random.bernoulli(1 - self.p, x.shape, key=key) / (1 - self.p)

"""Layers that behave under every MLX transformation: `vmap` over tasks, second order, `compile`.

`mx.conv2d`'s weight gradient and overlapping pooling have no `vmap` rule, and MLX's batch norm and dropout keep
state or draw from a global generator; these have none of that.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from ..precision import widened
from .conv import conv2d, custom_function, max_pool2d
from .functional import next_key
from .statistics import given_to, record

__all__ = ["Conv2d", "Dropout", "EpisodicBatchNorm", "Linear", "conv2d", "max_pool2d", "shared_times"]


class Linear(nn.Linear):
    """`mlx.nn.Linear` whose gradients, of every order, come out in the layout of what they are gradients of.

    MLX's own gives the weight's gradient as the transpose of an array, and a stack of weights and one of transposes are
    added at a sixth of the speed: a fifth of a MAML step of a small network on a CPU.
    """

    def __call__(self, x: mx.array) -> mx.array:
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y = _affine(rows, self.weight, self.bias) if "bias" in self else _times_transpose(rows, self.weight)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


@custom_function
def _affine(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    return mx.addmm(c, a, b.T)


@custom_function
def _times(a: mx.array, b: mx.array) -> mx.array:
    return a @ b


@custom_function
def _times_transpose(a: mx.array, b: mx.array) -> mx.array:
    return a @ b.T


@custom_function
def _transpose_times(a: mx.array, b: mx.array) -> mx.array:
    return a.T @ b


# The products are closed under differentiation, and none of the gradients is a transpose.
@_affine.vjp
def _(primals, cotangent, _output):
    a, b, _c = primals
    return _times(cotangent, b), _transpose_times(cotangent, a), mx.sum(cotangent, axis=0)


@_times.vjp
def _(primals, cotangent, _output):
    a, b = primals
    return _times_transpose(cotangent, b), _transpose_times(a, cotangent)


@_times_transpose.vjp
def _(primals, cotangent, _output):
    a, b = primals
    return _times(cotangent, b), _transpose_times(cotangent, a)


@_transpose_times.vjp
def _(primals, cotangent, _output):
    a, b = primals
    return _times_transpose(b, cotangent), _times(a, cotangent)


@custom_function
def shared_times(a: mx.array, b: mx.array) -> mx.array:
    """Rows a (N, K) times b (K, M), of which all tasks of a `vmap` share b: one product for all of them.

    So is b's gradient, where MLX's own would be as large as b for each task. (Small networks' layers gain nothing.)
    """
    return a @ b


@shared_times.vjp
def _(primals, cotangent, _output):
    a, b = primals
    return shared_times(cotangent, b.T), a.T @ cotangent


@shared_times.vmap
def _(inputs, axes):
    stacked = [axis is not None and axis >= 0 for axis in axes]
    a, b = (mx.moveaxis(x, axis, 0) if own else x for x, axis, own in zip(inputs, axes, stacked, strict=True))
    if stacked[1]:
        return a @ b, 0
    return shared_times(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1]), 0


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
    """Batch norm by the batch's own statistics, without memory of other batches: the transductive setting of MAML,
    in which what is asked together is normalised together.

    Normalises `x` (..., C) over every axis but the last, with the biased variance; within `nn.statistics.given`, by
    what is given there, as an adapted model does by its support's statistics.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.weight = mx.ones((num_features,))
        self.bias = mx.zeros((num_features,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        axes, found = tuple(range(x.ndim - 1)), given_to(self)
        wide = widened(x)
        mean = mx.mean(wide, axis=axes) if found is None else found[0]
        centred = wide - mean
        variance = mx.mean(mx.square(centred), axis=axes) if found is None else found[1]
        record(self, mean, variance)
        y = centred * (mx.rsqrt(variance + self.eps) * self.weight) + self.bias
        return y.astype(mx.result_type(x, self.weight))


def check_pure(model: nn.Module) -> None:
    """Refuse MLX's layers that are no function of weights, inputs and key, as what is traced has to be.

    Raises:
        ModelError: `mlx.nn.Dropout` or `mlx.nn.BatchNorm` (with running statistics), in training mode.
    """
    for path, module in model.named_modules():
        drops = isinstance(module, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)) and module._p_1 < 1
        if not module.training or not (drops or (isinstance(module, nn.BatchNorm) and module.track_running_stats)):
            continue
        does, instead = (
            ("draws from the global generator", Dropout) if drops else ("writes down every batch", EpisodicBatchNorm)
        )
        raise ModelError(
            f"{path or 'the model'} of {type(model).__name__} is an mlx.nn.{type(module).__name__} in training mode, "
            f"which {does}: use efficientai_toolkit.{instead.__name__}, or switch it off by model.eval()"
        )


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

"""ResNet-12, 640 wide (Lee et al. 2019; Mishra et al. 2018), with DropBlock (Ghiasi, Lin & Le 2018)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from ..errors import ModelError
from ..nn.functional import next_key
from ..nn.layers import Conv2d, Dropout, EpisodicBatchNorm, Linear, max_pool2d
from ..precision import widened
from ..settings import Count


class ResNet12(nn.Module):
    """Four residual blocks of three 3 × 3 convolutions, each block halving the image; mean over what is left.

    Args:
        input_shape: (height, width, channels); both sides at least 16.
        num_classes: size of the head.
        widths: filters of the blocks; (64, 160, 320, 640) is the network of MetaOptNet.
        dropout: of the first two blocks; the last two drop blocks with the same probability. Active where a key is
            given, that is in meta-training.
        block_size: side of the squares that DropBlock drops.
        key: for the weights (He-normal with the leaky slope; head scaled by fan-in).

    Reference: K. Lee, S. Maji, A. Ravichandran, S. Soatto, *Meta-Learning with Differentiable Convex Optimization*,
    CVPR 2019, arXiv:1904.03758. Differs from it in: batch norm uses the batch's statistics and keeps none; the features
    are pooled, as in Tian et al. (2020), not flattened; the probability of DropBlock is not annealed.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (84, 84, 3),
        num_classes: int = 5,
        widths: Sequence[Count] = (64, 160, 320, 640),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        block_size: Count = 5,
        *,
        key: mx.array | None = None,
    ):
        super().__init__()
        height, width, channels = input_shape
        if min(height, width) < 1 << len(widths):
            raise ModelError(f"images of {height} × {width} are too small for {len(widths)} blocks that halve them")
        keys = mx.random.split(mx.random.key(0) if key is None else key, len(widths) + 1)
        self.blocks = []
        for number, (filters, own) in enumerate(zip(widths, keys[:-1], strict=True)):
            drop = Dropout(dropout) if number < 2 else DropBlock(dropout, block_size)
            self.blocks.append(ResidualBlock(channels, filters, drop, key=own))
            channels = filters
        self.head = Linear(channels, num_classes)
        self.head.weight = mx.random.normal((num_classes, channels), key=keys[-1]) * channels**-0.5
        self.head.bias = mx.zeros((num_classes,))

    def features(self, x: mx.array) -> mx.array:
        """(N, H, W, C) or (N, H, W) → (N, `widths[-1]`)"""
        if x.ndim == 3:
            x = x[..., None]
        for block in self.blocks:
            x = block(x)
        return mx.mean(x, axis=(1, 2))

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, C) → logits (N, `num_classes`)"""
        return self.head(self.features(x))


class ResidualBlock(nn.Module):
    """(Convolution, norm, leaky ReLU) × 3, the last activation after adding a 1 × 1 projection; pool; drop."""

    def __init__(self, in_channels: int, out_channels: int, drop: nn.Module, *, key: mx.array):
        super().__init__()
        keys = mx.random.split(key, 4)
        sizes = (in_channels, out_channels, out_channels)
        self.convs = [_conv(n, out_channels, 3, k) for n, k in zip(sizes, keys[:3], strict=True)]
        self.norms = [EpisodicBatchNorm(out_channels) for _ in self.convs]
        self.projection = _conv(in_channels, out_channels, 1, keys[3])
        self.projection_norm = EpisodicBatchNorm(out_channels)
        self.drop = drop

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if number < len(self.convs) - 1:
                y = _leaky(y)
        return self.drop(max_pool2d(_leaky(y + self.projection_norm(self.projection(x)))))


class DropBlock(nn.Module):
    """Zeroes squares of an image batch (N, H, W, C), and scales up what is left; one mask for each image and channel.

    Draws from the key of the enclosing `functional(model)(…, key=key)`; inactive without one. A square larger than
    the image is the image.
    """

    def __init__(self, p: float = 0.1, block_size: int = 5):
        super().__init__()
        self.p, self.block_size = p, block_size

    def __call__(self, x: mx.array) -> mx.array:
        key = next_key() if self.p > 0 else None
        if key is None:
            return x
        n, height, width, channels = x.shape
        side = min(self.block_size, height, width)
        corners = (height - side + 1, width - side + 1)
        share = self.p * height * width / (side**2 * corners[0] * corners[1])
        seeds = mx.random.bernoulli(share, (n, *corners, channels), key=key).astype(x.dtype)
        kept = 1 - _grown(seeds, side)
        scale = kept.size / mx.maximum(mx.sum(widened(kept)), 1)  # float16 has no numbers as large as the sum
        return x * kept * scale.astype(x.dtype)


def _grown(seeds: mx.array, side: int) -> mx.array:
    """(N, h, w, C) top left corners → (N, h + side − 1, w + side − 1, C), 1 within their squares."""
    for axis in (1, 2):
        shifted = [
            mx.pad(seeds, [(i, side - 1 - i) if axis == other else (0, 0) for other in range(4)]) for i in range(side)
        ]
        seeds = functools.reduce(mx.maximum, shifted)
    return seeds


def _leaky(x: mx.array) -> mx.array:
    return mx.maximum(x, 0.1 * x)


def _conv(in_channels: int, out_channels: int, kernel_size: int, key: mx.array) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    std = (2 / (1.01 * kernel_size**2 * out_channels)) ** 0.5
    conv.weight = mx.random.normal(conv.weight.shape, key=key) * std
    return conv

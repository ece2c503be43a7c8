"""The four-block convolutional network of the few-shot papers (Vinyals et al. 2016; Finn et al. 2017)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from ..nn.activations import relu
from ..nn.conv import conv_norm_relu_pool
from ..nn.layers import Conv2d, EpisodicBatchNorm, Linear, max_pool2d
from ..nn.statistics import by_batch


class Conv4(nn.Module):
    """Four blocks of 3 × 3 convolution, episodic batch norm, ReLU, 2 × 2 max pooling; then a linear head.

    Args:
        input_shape: (height, width, channels) of one image; 28 × 28 × 1 leaves 1 × 1 × `hidden_dim` features,
            84 × 84 × 3 leaves 5 × 5 × `hidden_dim`.
        num_classes: size of the head.
        hidden_dim: filters a layer; 64 for Omniglot and prototypical networks, 32 for MAML on mini-ImageNet.
        num_layers: blocks.
        key: for the weights (Glorot-uniform convolutions as in the papers' code; head scaled by fan-in).
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 5,
        hidden_dim: int = 64,
        num_layers: int = 4,
        *,
        key: mx.array | None = None,
    ):
        super().__init__()
        keys = mx.random.split(mx.random.key(0) if key is None else key, num_layers + 1)
        height, width, channels = input_shape
        self.blocks = []
        for layer in range(num_layers):
            self.blocks.append(self.block(channels, hidden_dim, key=keys[layer]))
            channels = hidden_dim
        size = self.feature_size(height, width, channels, num_layers)
        self.head = Linear(size, num_classes)
        self.head.weight = mx.random.normal((num_classes, size), key=keys[-1]) * size**-0.5
        self.head.bias = mx.zeros((num_classes,))

    def block(self, in_channels: int, out_channels: int, *, key: mx.array) -> nn.Module:
        return ConvBlock(in_channels, out_channels, key=key)

    def feature_size(self, height: int, width: int, channels: int, num_layers: int) -> int:
        if min(height, width) < 1 << num_layers:
            raise ModelError(f"images of {height} × {width} are too small for {num_layers} blocks that halve them")
        return (height >> num_layers) * (width >> num_layers) * channels

    def features(self, x: mx.array) -> mx.array:
        """(N, H, W, C) or (N, H, W) → (N, features)"""
        if x.ndim == 3:
            x = x[..., None]
        for block in self.blocks:
            x = block(x)
        return x.reshape(x.shape[0], -1)

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, C) → logits (N, `num_classes`)"""
        return self.head(self.features(x))


class ConvBlock(nn.Module):
    """3 × 3 convolution, batch norm, ReLU, 2 × 2 max pooling. (The norm makes a convolution bias redundant.)"""

    def __init__(self, in_channels: int, out_channels: int, *, key: mx.array):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        bound = (6 / (9 * (in_channels + out_channels))) ** 0.5
        self.conv.weight = mx.random.uniform(-bound, bound, self.conv.weight.shape, key=key)
        self.norm = EpisodicBatchNorm(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        conv, norm = self.conv, self.norm
        # The fused operation reads their arrays, past an adapter or another layer in the place of one of them.
        if type(conv) is not Conv2d or type(norm) is not EpisodicBatchNorm or not by_batch(norm):
            return max_pool2d(relu(norm(conv(x))))
        return conv_norm_relu_pool(x, conv.weight, norm.weight, norm.bias, norm.eps)


class StridedConv4(Conv4):
    """The network of Finn et al. (2017) for Omniglot: each block halves the image by stride 2, and none pools.

    Features are the mean over the positions that are left, (N, `hidden_dim`). A quarter of Conv-4's work.
    """

    def block(self, in_channels: int, out_channels: int, *, key: mx.array) -> nn.Module:
        return StridedBlock(in_channels, out_channels, key=key)

    def feature_size(self, height: int, width: int, channels: int, num_layers: int) -> int:
        return channels

    def features(self, x: mx.array) -> mx.array:
        """(N, H, W, C) or (N, H, W) → (N, `hidden_dim`)"""
        if x.ndim == 3:
            x = x[..., None]
        for block in self.blocks:
            x = block(x)
        return mx.mean(x, axis=(1, 2))


class StridedBlock(ConvBlock):
    """3 × 3 convolution of stride 2, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, key: mx.array):
        super().__init__(in_channels, out_channels, key=key)
        self.conv.stride = 2

    def __call__(self, x: mx.array) -> mx.array:
        return relu(self.norm(self.conv(x)))

"""Tiny models for the adapters' tests; the decoder has mlx-lm's names and cache protocol."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from efficientai_toolkit.backbones.bert import Encoder, EncoderConfig
from efficientai_toolkit.backbones.conv4 import Conv4, StridedConv4
from efficientai_toolkit.backbones.mlp import MLP
from efficientai_toolkit.backbones.resnet12 import ResNet12


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.n_heads = heads
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)
        self.o_proj = nn.Linear(dims, dims)

    def __call__(self, x, mask=None, cache=None):
        n, length, dims = x.shape

        def heads(y):
            return y.reshape(n, length, self.n_heads, -1).transpose(0, 2, 1, 3)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=(dims // self.n_heads) ** -0.5, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(n, length, dims))


class FeedForward(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.up_proj = nn.Linear(dims, 2 * dims)
        self.down_proj = nn.Linear(2 * dims, dims)

    def __call__(self, x):
        return self.down_proj(nn.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.self_attn = Attention(dims, heads)
        self.norm1 = nn.LayerNorm(dims)
        self.mlp = FeedForward(dims)
        self.norm2 = nn.LayerNorm(dims)

    def __call__(self, x, mask):
        x = x + self.self_attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """(N, L) ids → (N, `num_classes`): causal, the head reads the last position."""

    def __init__(self, dims: int = 32, heads: int = 4, layers: int = 2, vocabulary: int = 50, num_classes: int = 3):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, dims)
        self.layers = [Block(dims, heads) for _ in range(layers)]
        self.head = nn.Linear(dims, num_classes)

    def features(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, "causal")
        return x[:, -1]

    def __call__(self, ids):
        return self.head(self.features(ids))


def decoder() -> tuple[nn.Module, mx.array]:
    mx.random.seed(1)
    return Decoder(), mx.random.randint(0, 50, (3, 4, 7), key=mx.random.key(2))


def quantized_decoder() -> tuple[nn.Module, mx.array]:
    model, x = decoder()
    nn.quantize(model, group_size=32, bits=8)
    return model, x


def mlp() -> tuple[nn.Module, mx.array]:
    return MLP(6, 3, 16, 2, key=mx.random.key(1)), mx.random.normal((3, 4, 6), key=mx.random.key(2))


def encoder() -> tuple[nn.Module, mx.array]:
    config = EncoderConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, max_positions=40, sep_id=3
    )
    model = Encoder(config, 3, key=mx.random.key(1))
    # BERT's small start leaves outputs, and with them all differences, near rounding.
    model.apply(lambda weight: weight * 10 if weight.ndim == 2 else weight)
    ids = mx.random.randint(4, 50, (3, 4, 7), key=mx.random.key(2))
    lengths = mx.array([[7, 5, 6, 7], [4, 7, 7, 3], [7, 7, 2, 6]])
    return model, mx.where(mx.arange(7) < lengths[..., None], ids, 0)


def images() -> mx.array:
    return mx.random.normal((3, 4, 8, 8, 1), key=mx.random.key(2))


def conv4() -> tuple[nn.Module, mx.array]:
    return Conv4((8, 8, 1), 4, hidden_dim=8, num_layers=2, key=mx.random.key(1)), images()


def strided_conv4() -> tuple[nn.Module, mx.array]:
    return StridedConv4((8, 8, 1), 4, hidden_dim=8, num_layers=2, key=mx.random.key(1)), images()


def resnet12() -> tuple[nn.Module, mx.array]:
    return ResNet12((8, 8, 1), 4, (4, 8), key=mx.random.key(1)), images()


CONVOLUTIONAL = {"conv4": conv4, "strided_conv4": strided_conv4, "resnet12": resnet12}
MODELS = {"mlp": mlp, "decoder": decoder, "quantized": quantized_decoder, "encoder": encoder, **CONVOLUTIONAL}

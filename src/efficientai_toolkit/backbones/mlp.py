"""Multilayer perceptrons: the classifier of the synthetic families and the regressor of the sinusoid papers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..nn.activations import relu
from ..nn.layers import Linear


class MLP(nn.Module):
    """`input_dim` → `num_layers` × (Linear(`hidden_dim`), ReLU) → Linear(`output_dim`).

    Weights are He-normal and biases zero, as in Finn et al. (2017) up to the scale of the weights (they use a
    truncated normal of 0.01; He's trains faster and ends lower on the sinusoids). A trailing image shape is
    flattened where `input_dim` is its size.

    Args:
        input_dim: size of one input.
        output_dim: size of one output.
        hidden_dim: width.
        num_layers: hidden layers; 0 gives a linear model.
        key: for the weights.
    """

    def __init__(
        self,
        input_dim: int = 1,
        output_dim: int = 1,
        hidden_dim: int = 40,
        num_layers: int = 2,
        *,
        key: mx.array | None = None,
    ):
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * num_layers, output_dim]
        keys = mx.random.split(mx.random.key(0) if key is None else key, len(sizes) - 1)
        layers = [_he_linear(n, m, k) for n, m, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]
        self.layers, self.head = layers[:-1], layers[-1]
        self.input_dim = input_dim

    def features(self, x: mx.array) -> mx.array:
        """(N, `input_dim`) → (N, `hidden_dim`)"""
        if x.shape[-1] != self.input_dim or x.shape == (1,):  # that is one number as a batch of one
            x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = relu(layer(x))
        return x

    def __call__(self, x: mx.array) -> mx.array:
        """(N, `input_dim`) → (N, `output_dim`)"""
        return self.head(self.features(x))


class SimpleClassifier(MLP):
    """The MLP for classification: (N, `input_dim`) → logits (N, `num_classes`)."""

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 64,
        num_classes: int = 2,
        num_layers: int = 2,
        *,
        key: mx.array | None = None,
    ):
        super().__init__(input_dim, num_classes, hidden_dim, num_layers, key=key)


def _he_linear(n: int, m: int, key: mx.array) -> nn.Linear:
    layer = Linear(n, m)
    layer.weight = mx.random.normal((m, n), key=key) * (2 / n) ** 0.5
    layer.bias = mx.zeros((m,))
    return layer

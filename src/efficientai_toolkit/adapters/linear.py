"""Linear adapters: one square matrix behind a frozen layer, in residual form (Rebuffi et al. 2017).

arXiv 1705.08045.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Positive
from .base import Adapter, AdapterConfig, Site, linear_from
from .quantized import is_linear
from .widths import width_out


class LinearAdapter(Adapter):
    """y = h + h W + b,  h = base(x): W (out, out) and b (out,) start at zero, so the output is the base's.

    Affine, so that it merges into a linear base: (I + W)ᵀ W₀. Parameters: out² + out. Differs from the paper in: no
    norm follows the sum, which convolutional residual adapters have and a transformer's layer does not.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = mx.zeros((size, size))
        self.bias = mx.zeros((size,))

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        return cls(width_out(base))

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return width_out(base) * (width_out(base) + 1)

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        h = base(x)
        return h + (h @ self.weight + self.bias).astype(h.dtype)

    def fuse(self, base: Any) -> nn.Module:
        if not is_linear(base):
            return super().fuse(base)
        weight = base.weight + self.weight.T @ base.weight
        bias = self.bias if "bias" not in base else base.bias + base.bias @ self.weight + self.bias
        return linear_from(weight.astype(base.weight.dtype), bias.astype(base.weight.dtype))


@dataclass(frozen=True)
class LinearAdapterConfig(AdapterConfig):
    """Behind each attention output and each feed-forward. Default rate: 1e-3, between Houlsby's best (3e-3 … 3e-4);
    the paper's own rates are for SGD on convolutions."""

    learning_rate: Positive = 1e-3

    adapter: ClassVar[type[Adapter]] = LinearAdapter
    targets: ClassVar = (("attention_output", "feedforward_out"), ("linear",))

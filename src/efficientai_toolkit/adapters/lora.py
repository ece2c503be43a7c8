"""LoRA: a low-rank change beside a frozen linear layer (Hu et al. 2022, arXiv 2106.09685), and its rsLoRA scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..nn.layers import Dropout
from ..settings import Count, Positive, Share
from .base import Adapter, AdapterConfig, Site, kaiming_uniform, linear_from
from .quantized import in_features, out_features


class LoRA(Adapter):
    """y = base(x) + s · dropout(x) A B,  s = α / r.

    A (in, r) is Kaiming-uniform and B (r, out) zero, so that the output is the base's at the start; both as in
    mlx-lm. Parameters: r · (in + out).
    """

    def __init__(self, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float):
        super().__init__()
        self.lora_a, self.lora_b = lora_a, lora_b
        self.scale = scale
        self.dropout = Dropout(dropout)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        n, m = in_features(base), out_features(base)
        a = kaiming_uniform(key, n, (n, config.rank))
        return cls(a, mx.zeros((config.rank, m)), config.scale, config.dropout)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return config.rank * (in_features(base) + out_features(base))

    def delta(self) -> mx.array:
        """The change of the weight, (out, in)."""
        return self.scale * (self.lora_a @ self.lora_b).T

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        y = base(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return y + (self.scale * z).astype(y.dtype)

    def fuse(self, base: Any) -> nn.Linear:
        return linear_from(base.weight + self.delta().astype(base.weight.dtype), base.get("bias"))


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Defaults: the paper's for RoBERTa-base on GLUE (its table 9): r = α = 8 on query and value, 4e-4 … 5e-4.

    Args:
        rank: r.
        alpha: α; the change is scaled by α / r.
        dropout: of the adapter's input.
        learning_rate: a good rate for Adam in plain fine-tuning.
    """

    rank: Count = 8
    alpha: Positive = 8.0
    dropout: Share = 0.0
    learning_rate: Positive = 5e-4

    adapter: ClassVar[type[Adapter]] = LoRA
    targets: ClassVar = (("query", "value"), ("linear",))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class RsLoRAConfig(LoRAConfig):
    """Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): s = α / √r, which keeps the size of the change
    independent of the rank. Defaults as LoRA's; the paper tunes the rate for each rank."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5

"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Count, Positive, Share
from .base import Adapter, Site, linear_from
from .lora import LoRA, LoRAConfig
from .quantized import dense_weight, out_features


class DoRA(LoRA):
    """W′ = m ⊙ (W + s BA) / ‖W + s BA‖, the norm taken over each output's row: magnitude m and direction apart.

    m starts as ‖W‖, so the output is the base's at the start. The norm counts as a constant in the gradient
    (section 4.3 of the paper), as in Hugging Face PEFT. Parameters: r · (in + out) + out.
    """

    def __init__(self, lora_a: mx.array, lora_b: mx.array, m: mx.array, scale: float, dropout: float):
        super().__init__(lora_a, lora_b, scale, dropout)
        self.m = m

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        start = LoRA.from_base(base, config, key, site)
        m = mx.linalg.norm(dense_weight(base).astype(mx.float32), axis=1)
        return cls(start.lora_a, start.lora_b, m, config.scale, config.dropout)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return super().num_parameters(base, config, path) + out_features(base)

    def gain(self, base: Any) -> mx.array:
        """m / ‖W + s BA‖, (out,); 1 for a row where both are zero, as at the start a pruned one is"""
        weight = mx.stop_gradient(dense_weight(base) + self.delta())
        norm = mx.linalg.norm(weight, axis=1)
        both = (norm == 0).astype(norm.dtype)
        return (self.m + both) / (norm + both)

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        y = base(x)
        dropped = self.dropout(x)
        # One mask for both parts, as in PEFT: y = base(x) + (gain − 1) · W dropout(x) + gain · s · BA dropout(x).
        plain = y if dropped is x else base(dropped)
        if "bias" in base:
            plain = plain - base.bias
        z = (dropped @ self.lora_a) @ self.lora_b
        gain = self.gain(base)
        return y + ((gain - 1) * plain + gain * (self.scale * z)).astype(y.dtype)

    def fuse(self, base: Any) -> nn.Linear:
        weight = self.gain(base)[:, None] * (base.weight + self.delta())
        return linear_from(weight.astype(base.weight.dtype), base.get("bias"))


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """Defaults: the paper's LLaMA runs (its appendix): α = 2 r, dropout 0.05, 2e-4; r = 16."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Share = 0.05
    learning_rate: Positive = 2e-4

    adapter: ClassVar[type[Adapter]] = DoRA

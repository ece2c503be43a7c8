"""(IA)³: learned rescaling of keys, values and feed-forward activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Positive
from .base import Adapter, AdapterConfig, Site, linear_from
from .quantized import in_features, out_features
from .select import NAMES, named


class IA3(Adapter):
    """y = l ⊙ base(x); on a feed-forward's second layer y = base(l ⊙ x), which scales the hidden activations.

    l starts at one, so the output is the base's at the start. Parameters: out, or in on the feed-forward.
    """

    def __init__(self, ia3: mx.array, scales_input: bool):
        super().__init__()
        self.ia3 = ia3
        self.scales_input = scales_input

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        return cls(mx.ones((cls.num_parameters(base, config, site.path),)), scales_input(site.path, config))

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return in_features(base) if scales_input(path, config) else out_features(base)

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        if self.scales_input:
            return base((x * self.ia3).astype(x.dtype))
        y = base(x)
        return (y * self.ia3).astype(y.dtype)

    def fuse(self, base: Any) -> nn.Linear:
        weight, bias = base.weight, base.get("bias")
        if self.scales_input:
            return linear_from((weight * self.ia3).astype(weight.dtype), bias)
        bias = None if bias is None else (bias * self.ia3).astype(bias.dtype)
        return linear_from((weight * self.ia3[:, None]).astype(weight.dtype), bias)


def scales_input(path: str, config: Any) -> bool:
    """Whether the input of the layer at `path` is scaled, not its output."""
    names = NAMES["feedforward_out"] if config.feedforward is None else config.feedforward
    return any(named(f".{path}", name) for name in names)


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """Default rate: T-Few's 3e-3 (section 3.3 of the paper, there with Adafactor). Keys, values, feed-forward.

    Args:
        feedforward: names or paths of the layers whose input is scaled, or the ends of such; with a dot before it
            (".fc", which is not "block.fc") a whole path. `None` knows the usual ones.
    """

    feedforward: tuple[str, ...] | None = None

    learning_rate: Positive = 3e-3

    adapter: ClassVar[type[Adapter]] = IA3
    targets: ClassVar = (("key", "value", "feedforward_out"), ("linear",))

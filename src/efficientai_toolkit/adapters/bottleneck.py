"""Bottleneck adapters: a small two-layer network behind or beside a frozen one.

Houlsby et al. 2019 (arXiv 1902.00751): behind each attention and each feed-forward, before the residual sum.
Pfeiffer et al. 2021 (arXiv 2005.00247): behind the feed-forward only. He et al. 2022 (arXiv 2110.04366): beside the
feed-forward, scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from ..nn.activations import ACTIVATIONS
from ..nn.layers import Dropout
from ..settings import Count, Positive, Share
from .base import Adapter, AdapterConfig, Site, kaiming_uniform, linear_from
from .widths import has_width, width_in, width_out


class Bottleneck(Adapter):
    """y = h + up(f(down(h))),  h = base(x).

    down (d → b) is Kaiming-uniform, up (b → d) zero, so the output is the base's at the start. Parameters:
    2 d b + b + d. Differs from the papers in: up is exactly zero, not near zero; Pfeiffer's adapter sits before the
    residual sum and its layer norm, where a slot around one module can be.
    """

    wants: ClassVar[str] = "a layer or block of known width"

    def __init__(self, down: nn.Module, up: nn.Module, config: Any):
        super().__init__()
        self.down, self.up = down, up
        self.dropout = Dropout(config.dropout)
        self.activation = config.activation
        self.scale = config.scale

    @classmethod
    def fits(cls, base: Any) -> bool:
        return has_width(base)

    @classmethod
    def widths(cls, base: Any) -> tuple[int, int]:
        """What the adapter takes and gives."""
        return width_out(base), width_out(base)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        n, m = cls.widths(base)
        size = config.size(m)
        down = linear_from(kaiming_uniform(key, n, (size, n)), mx.zeros((size,)))
        return cls(down, linear_from(mx.zeros((m, size)), mx.zeros((m,))), config)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        n, m = cls.widths(base)
        size = config.size(m)
        return size * (n + m) + size + m

    def branch(self, x: mx.array) -> mx.array:
        z = self.up(ACTIVATIONS[self.activation](self.down(self.dropout(x))))
        return (self.scale * z).astype(x.dtype)

    def __call__(self, base: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        h = base(x, *args, **kwargs)
        return h + self.branch(h)


class ParallelBottleneck(Bottleneck):
    """y = base(x) + s · up(f(down(x))): the adapter reads what the base reads."""

    @classmethod
    def widths(cls, base: Any) -> tuple[int, int]:
        return width_in(base), width_out(base)

    def __call__(self, base: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return base(x, *args, **kwargs) + self.branch(x)


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """What the placements share; the rate is Houlsby's.

    Args:
        bottleneck: b; `None` takes d / `reduction`.
        reduction: d / b.
        activation: `relu`, `gelu`, `gelu_tanh`, `silu` or `tanh`.
        dropout: of the adapter's input.
        scale: s.
    """

    bottleneck: Count | None = None
    reduction: Annotated[float, Field(ge=1)] = 16
    activation: str = "relu"
    dropout: Share = 0.0
    scale: float = 1.0
    learning_rate: Positive = 1e-3

    adapter: ClassVar[type[Adapter]] = Bottleneck
    targets: ClassVar = (("feedforward_out",), ("linear",))

    def __post_init__(self):
        super().__post_init__()
        self.require(self.activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}")

    def size(self, width: int) -> int:
        """b for a layer of this width."""
        return self.bottleneck or max(1, int(width // self.reduction))


@dataclass(frozen=True)
class HoulsbyConfig(BottleneckConfig):
    """Defaults: the paper's BERT runs: b = 64 and 1e-3 (its search is over 3e-5 … 3e-3), GELU as BERT's own."""

    bottleneck: Count | None = 64
    activation: str = "gelu"

    targets: ClassVar = (("attention_output", "feedforward_out"), ("linear",))


@dataclass(frozen=True)
class PfeifferConfig(BottleneckConfig):
    """Defaults: the paper's: d / b = 16, ReLU, 1e-4."""

    learning_rate: Positive = 1e-4


@dataclass(frozen=True)
class ParallelConfig(BottleneckConfig):
    """Defaults: the paper's scaled parallel adapter: b = 512 there at width 1024 (d / b = 2), s = 4, 1e-4 on GLUE.
    Here d / b = 16, as a few examples ask for."""

    scale: float = 4.0
    learning_rate: Positive = 1e-4

    adapter: ClassVar[type[Adapter]] = ParallelBottleneck
    targets: ClassVar = (("feedforward",), ("linear",))

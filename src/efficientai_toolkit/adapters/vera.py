"""VeRA: vectors that scale one frozen random pair shared by all layers (Kopiczko et al. 2024, arXiv 2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..nn.layers import Dropout
from ..settings import Count, Positive, Share
from .base import Adapter, AdapterConfig, Owner, Site, kaiming_uniform, linear_from
from .quantized import in_features, out_features


class SharedPair(nn.Module):
    """The frozen A (in, r) and B (r, out) of all layers, as large as the largest needs; each layer takes a corner."""

    frozen: ClassVar[tuple[str, ...]] = ("a", "b")

    def __init__(self, a: mx.array, b: mx.array):
        super().__init__()
        self.a, self.b = a, b
        self.freeze()


class VeRA(Adapter):
    """y = base(x) + ((dropout(x) A) ⊙ d) B ⊙ b.

    Only d (r,) and b (out,) are trained; b starts at zero, so the output is the base's at the start. A and B are
    frozen and Kaiming-uniform as He et al. have it, U(±√(6 / fan)), which is √6 times a linear layer's start.
    Parameters: r + out.
    """

    def __init__(self, owner: Owner, rank: int, out: int, d_initial: float, dropout: float):
        super().__init__()
        self.owner = owner
        self.d = mx.full((rank,), d_initial)
        self.b = mx.zeros((out,))
        self.dropout = Dropout(dropout)

    @classmethod
    def share(cls, bases: Sequence[Any], config: Any, key: mx.array) -> SharedPair:
        key_a, key_b = mx.random.split(key)
        n, m = max(map(in_features, bases)), max(map(out_features, bases))
        a, b = kaiming_uniform(key_a, n, (n, config.rank)), kaiming_uniform(key_b, config.rank, (config.rank, m))
        return SharedPair(math.sqrt(6) * a, math.sqrt(6) * b)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        assert site.owner is not None
        return cls(site.owner, config.rank, out_features(base), config.d_initial, config.dropout)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return config.rank + out_features(base)

    def __call__(self, base: Any, x: mx.array) -> mx.array:
        y = base(x)
        shared = self.owner.module
        z = (self.dropout(x) @ shared.a[: x.shape[-1]]) * self.d
        z = (z @ shared.b[:, : self.b.shape[0]]) * self.b
        return y + z.astype(y.dtype)

    def fuse(self, base: Any) -> nn.Linear:
        n, m = in_features(base), out_features(base)
        shared = self.owner.module
        delta = ((shared.a[:n] * self.d) @ shared.b[:, :m] * self.b).T
        return linear_from(base.weight + delta.astype(base.weight.dtype), base.get("bias"))


@dataclass(frozen=True)
class VeRAConfig(AdapterConfig):
    """Defaults: the paper's for GLUE: r = 256 … 1024, d = 0.1 at the start, 4e-3 … 1e-2 (SST-2's and MRPC's)."""

    rank: Count = 256
    d_initial: float = 0.1
    dropout: Share = 0.0
    learning_rate: Positive = 4e-3

    adapter: ClassVar[type[Adapter]] = VeRA
    targets: ClassVar = (("query", "value"), ("linear",))

"""Compacter: bottlenecks of parameterised hypercomplex layers (Karimi Mahabadi et al. 2021, arXiv 2106.04647)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field

from ..errors import AdapterError
from ..settings import Count, Positive
from .base import Adapter, Owner, Site
from .bottleneck import Bottleneck, BottleneckConfig
from .widths import width_out


class SharedRules(nn.Module):
    """The A₁ … Aₙ (n, n, n) of all layers, one set for the downs and one for the ups."""

    def __init__(self, n: int, key: mx.array):
        super().__init__()
        key_down, key_up = mx.random.split(key)
        self.down = 0.01 * mx.random.normal((n, n, n), key=key_down)
        self.up = 0.01 * mx.random.normal((n, n, n), key=key_up)


class LowRankPHM(nn.Module):
    """x W + c with W = Σᵢ Aᵢ ⊗ (sᵢ tᵢ): Aᵢ (n, n) shared, sᵢ (in/n, rank), tᵢ (rank, out/n).

    The Kronecker products are never formed: with x as (n, in/n), (x W)[p, q] = Σᵢ Σₖₗ Aᵢ[k, p] x[k, l] (sᵢ tᵢ)[l, q].
    Parameters: n · rank · (in/n + out/n) + out = rank · (in + out) + out.
    """

    def __init__(self, owner: Owner, which: str, left: mx.array, right: mx.array):
        super().__init__()
        self.owner, self.which = owner, which
        self.left, self.right = left, right
        self.bias = mx.zeros((left.shape[0] * right.shape[2],))

    def rule(self) -> mx.array:
        return self.owner.module[self.which]

    def weight(self) -> mx.array:
        """W (in, out), formed; for tests and inspection."""
        product = self.left @ self.right  # (n, in/n, out/n)
        out = mx.einsum("ikp,ilq->klpq", self.rule(), product)
        return out.reshape(out.shape[0] * out.shape[1], -1)

    def __call__(self, x: mx.array) -> mx.array:
        n = self.left.shape[0]
        x = x.reshape(*x.shape[:-1], n, x.shape[-1] // n)
        inner = mx.einsum("...kl,ilr->...ikr", x, self.left)
        inner = mx.einsum("...ikr,ikp->...ipr", inner, self.rule())
        out = mx.einsum("...ipr,irq->...pq", inner, self.right)
        return out.reshape(*out.shape[:-2], -1) + self.bias


class Compacter(Bottleneck):
    """A bottleneck adapter whose two matrices are Kronecker sums with shared factors.

    sᵢ and tᵢ are Glorot-normal, but for the up's tᵢ, which are zero, so that the output is the base's at the start.
    Parameters: 2 n³ in all, and a layer d + b each way as in `LowRankPHM`. Differs from the paper in: exactly, not
    nearly, the base's output at the start; A is normal of 0.01 as in its code.
    """

    def __init__(self, owner: Owner, width: int, size: int, key: mx.array, config: Any):
        n, rank = config.divisor, config.rank
        keys = mx.random.split(key, 3)

        def factor(key: mx.array, a: int, b: int) -> mx.array:
            return mx.random.normal((n, a, b), key=key) * (2 / (a + b)) ** 0.5

        down = LowRankPHM(owner, "down", factor(keys[0], width // n, rank), factor(keys[1], rank, size // n))
        up = LowRankPHM(owner, "up", factor(keys[2], size // n, rank), mx.zeros((n, rank, width // n)))
        super().__init__(down, up, config)

    @classmethod
    def share(cls, bases: Sequence[Any], config: Any, key: mx.array) -> SharedRules:
        return SharedRules(config.divisor, key)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        assert site.owner is not None
        width = width_out(base)
        if width % config.divisor:
            raise AdapterError(
                f"CompacterConfig: divisor {config.divisor} does not divide the width {width} of {site.path!r}"
            )
        return cls(site.owner, width, config.size(width), key, config)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        width = width_out(base)
        size = config.size(width)
        return 2 * config.rank * (width + size) + size + width

    @classmethod
    def num_shared(cls, bases: Sequence[Any], config: Any) -> int:
        return 2 * config.divisor**3


@dataclass(frozen=True)
class CompacterConfig(BottleneckConfig):
    """Defaults: the paper's: n = 4, rank 1, d / b = 32, GELU, 3e-3, behind attention and feed-forward.

    Args:
        divisor: n, of the Kronecker products; it divides the width, and the bottleneck is rounded up to it.
        rank: of each sᵢ tᵢ.
    """

    divisor: Count = 4
    rank: Count = 1
    reduction: Annotated[float, Field(ge=1)] = 32
    activation: str = "gelu"
    learning_rate: Positive = 3e-3

    adapter: ClassVar[type[Adapter]] = Compacter
    targets: ClassVar = (("attention_output", "feedforward_out"), ("linear",))

    def size(self, width: int) -> int:
        return -(-super().size(width) // self.divisor) * self.divisor

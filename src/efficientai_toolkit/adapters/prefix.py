"""Prefix tuning: trained keys and values before those of every attention layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from ..settings import Count, Positive
from .base import Adapter, AdapterConfig, Owner, Site, kaiming_uniform, linear_from
from .quantized import out_features
from .select import NAMES, is_attention


def projection(base: Any, kind: str) -> nn.Module:
    """The query, key or value layer of an attention module."""
    return next(base[name] for name in NAMES[kind] if name in base)


class PrefixCache:
    """Speaks the cache protocol of mlx-lm (`offset`, `update_and_fetch`): puts the prefix before the keys and values.

    A real cache (generation) holds the prefix from its first call on.
    """

    def __init__(self, keys: mx.array, values: mx.array, inner: Any = None):
        self.keys, self.values, self.inner = keys, values, inner

    @property
    def offset(self) -> int:
        return self.keys.shape[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(N, heads, L, d) both → (N, heads, P + L, d)"""
        keys = mx.concatenate([_as_heads(self.keys, keys), keys], axis=2)
        values = mx.concatenate([_as_heads(self.values, values), values], axis=2)
        return (keys, values) if self.inner is None else self.inner.update_and_fetch(keys, values)


def _as_heads(prefix: mx.array, like: mx.array) -> mx.array:
    """(P, heads · d) → (N, heads, P, d)"""
    n, heads, _, size = like.shape
    prefix = prefix.reshape(prefix.shape[0], heads, size).transpose(1, 0, 2).astype(like.dtype)
    return mx.broadcast_to(prefix, (n, *prefix.shape))


class Prefix(Adapter):
    """Attention over [P; keys] and [P′; values]: P, P′ (length, width) trained, one pair a layer.

    Works on every attention module that takes a cache as mlx-lm's do, and on `mlx.nn.MultiHeadAttention`. Positions
    (rotary, and the shipped encoders') count on from the prefix, as in P-tuning v2 and PEFT. It acts with
    weight 1, and with no other adapter of the same layers. Parameters: 2 · length · width a layer.
    """

    wants: ClassVar[str] = "an attention module"
    combines: ClassVar[bool] = False

    def __init__(self, keys: mx.array, values: mx.array):
        super().__init__()
        self.prefix_keys, self.prefix_values = keys, values

    @classmethod
    def fits(cls, base: Any) -> bool:
        return is_attention(base)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        shape = (config.length, out_features(projection(base, "key")))
        keys, values = 0.02 * mx.random.normal((2, *shape), key=key)
        return cls(keys, values)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return 2 * config.length * out_features(projection(base, "key"))

    def prefix(self) -> tuple[mx.array, mx.array]:
        """(length, width) both"""
        return self.prefix_keys, self.prefix_values

    @property
    def length(self) -> int:
        return self.prefix()[0].shape[0]

    def __call__(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.prefix()
        if isinstance(base, nn.MultiHeadAttention):
            return _multi_head(base, keys, values, *args, **kwargs)
        return _cached(base, keys, values, *args, **kwargs)


def _cached(base: Any, keys: mx.array, values: mx.array, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    if cache is not None and cache.offset:
        return base(x, mask, cache)
    return base(x, _widened(mask, keys.shape[0]), PrefixCache(keys, values, cache))


def _multi_head(base: Any, pk: mx.array, pv: mx.array, q: mx.array, k: mx.array, v: mx.array, mask: Any = None):
    def heads(y: mx.array) -> mx.array:
        return mx.unflatten(y, -1, (base.num_heads, -1)).transpose(0, 2, 1, 3)

    q, k, v = heads(base.query_proj(q)), heads(base.key_proj(k)), heads(base.value_proj(v))
    k, v = PrefixCache(pk, pv).update_and_fetch(k, v)
    mask = _widened(mask, pk.shape[0])
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
    return base.out_proj(y.transpose(0, 2, 1, 3).flatten(-2, -1))


def _widened(mask: Any, length: int) -> Any:
    """A mask array for `length` more keys on the left, all attended. ("causal" is aligned to the right by itself.)"""
    if not isinstance(mask, mx.array):
        return mask
    more = mx.zeros if mx.issubdtype(mask.dtype, mx.floating) else mx.ones
    return mx.concatenate([more((*mask.shape[:-1], length), dtype=mask.dtype), mask], axis=-1)


class PrefixMLP(nn.Module):
    """The reparameterisation: one embedding and one two-layer network give every layer's prefix."""

    def __init__(self, length: int, width: int, hidden: int, layers: int, key: mx.array):
        super().__init__()
        k0, k1, k2 = mx.random.split(key, 3)
        self.embedding = mx.random.normal((length, width), key=k0)
        self.up = linear_from(kaiming_uniform(k1, width, (hidden, width)), mx.zeros((hidden,)))
        out = layers * 2 * width
        self.down = linear_from(kaiming_uniform(k2, hidden, (out, hidden)), mx.zeros((out,)))

    def pair(self, index: int) -> tuple[mx.array, mx.array]:
        """Keys and values (length, width) of layer `index`."""
        width = self.embedding.shape[1]
        hidden = mx.tanh(self.up(self.embedding))
        start = 2 * index * width
        both = hidden @ self.down.weight[start : start + 2 * width].T + self.down.bias[start : start + 2 * width]
        return both[:, :width], both[:, width:]


class ReparameterizedPrefix(Prefix):
    """A prefix given by `PrefixMLP`, whose arrays are trained in its place.

    Parameters: length · w + (w + 1) · hidden + (hidden + 1) · 2 · layers · w, all of them shared.
    """

    def __init__(self, owner: Owner, index: int):
        nn.Module.__init__(self)
        self.owner, self.index = owner, index

    @classmethod
    def share(cls, bases: Sequence[Any], config: Any, key: mx.array) -> PrefixMLP:
        width = cls._width(bases)
        return PrefixMLP(config.length, width, config.hidden or width, len(bases), key)

    @classmethod
    def from_base(cls, base: Any, config: Any, key: mx.array, site: Site) -> Self:
        assert site.owner is not None
        return cls(site.owner, site.index)

    @classmethod
    def num_parameters(cls, base: Any, config: Any, path: str = "") -> int:
        return 0

    @classmethod
    def num_shared(cls, bases: Sequence[Any], config: Any) -> int:
        w = cls._width(bases)
        hidden = config.hidden or w
        return config.length * w + (w + 1) * hidden + (hidden + 1) * 2 * len(bases) * w

    @staticmethod
    def _width(bases: Sequence[Any]) -> int:
        return max(out_features(projection(base, "key")) for base in bases)

    def prefix(self) -> tuple[mx.array, mx.array]:
        return self.owner.module.pair(self.index)


@dataclass(frozen=True)
class PrefixConfig(AdapterConfig):
    """Prefixes trained directly, as in P-tuning v2 (Liu et al. 2022, arXiv 2110.07602), whose rates on classification
    are 5e-3 … 1e-2; ten tokens are Li & Liang's for table-to-text. The start is normal of 0.02, small beside real keys.

    Args:
        length: tokens of the prefix.
    """

    length: Count = 10
    learning_rate: Positive = 5e-3

    adapter: ClassVar[type[Adapter]] = Prefix
    targets: ClassVar = (("attention",),)


@dataclass(frozen=True)
class PrefixMLPConfig(PrefixConfig):
    """Prefixes through the paper's reparameterisation. Defaults: its hidden size of 512 and 5e-5.

    Args:
        hidden: width of the network; `None` takes the width of the keys.
    """

    hidden: Count | None = 512
    learning_rate: Positive = 5e-5

    adapter: ClassVar[type[Adapter]] = ReparameterizedPrefix

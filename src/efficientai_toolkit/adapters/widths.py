"""How wide what a block takes and gives is."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .quantized import in_features, is_linear, out_features
from .select import KINDS, walk

_TAKE = ("query", "key", "value", "feedforward_in")  # kinds of layers that take what the block does
_GIVE = ("attention_output", "feedforward_out")  # kinds that give what the block does


def width_in(base: Any) -> int:
    """Size of the last axis of what `base` takes."""
    if is_linear(base):
        return in_features(base)
    layers = _linears(base, *_GIVE)
    return in_features(layers[0]) if layers else _norm_width(base)


def width_out(base: Any) -> int:
    """Size of the last axis of what `base` gives."""
    if is_linear(base):
        return out_features(base)
    layers = _linears(base, *_TAKE)
    return out_features(layers[-1]) if layers else _norm_width(base)


def has_width(base: Any) -> bool:
    return is_linear(base) or bool(_linears(base)) or ("weight" in base and base.weight.ndim == 1)


def _linears(base: Any, *others: str) -> list[nn.Module]:
    """The linear layers of a block, in the order its class made them: the first takes its input, the last gives its
    output. Those of the kinds `others` are left out where others are left (mlx-lm makes Llama's up_proj last).
    """
    found = [node for node in walk(base) if node.path and is_linear(node.module)]
    kept = [node for node in found if not any(KINDS[kind](node) for kind in others)]
    return [node.module for node in kept or found]


def _norm_width(base: Any) -> int:
    return base.weight.shape[-1]

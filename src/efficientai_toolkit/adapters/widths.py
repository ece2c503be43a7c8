"""How wide what a block takes and gives is."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .quantized import in_features, is_linear, out_features
from .select import walk


def width_in(base: Any) -> int:
    """Size of the last axis of what `base` takes."""
    if is_linear(base):
        return in_features(base)
    return in_features(_linears(base)[0]) if _linears(base) else _norm_width(base)


def width_out(base: Any) -> int:
    """Size of the last axis of what `base` gives."""
    if is_linear(base):
        return out_features(base)
    return out_features(_linears(base)[-1]) if _linears(base) else _norm_width(base)


def has_width(base: Any) -> bool:
    return is_linear(base) or bool(_linears(base)) or ("weight" in base and base.weight.ndim == 1)


def _linears(base: Any) -> list[nn.Module]:
    """The linear layers of a block, in the order its class made them (first takes its input, last gives its output)."""
    return [node.module for node in walk(base) if node.path and is_linear(node.module)]


def _norm_width(base: Any) -> int:
    return base.weight.shape[-1]

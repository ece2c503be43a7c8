"""Half precision, where it does not suffice."""

from __future__ import annotations

import mlx.core as mx


def widened(x: mx.array) -> mx.array:
    """x in float32 where it has half precision; sums and squares of float16 overflow, small ones are lost."""
    return x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x

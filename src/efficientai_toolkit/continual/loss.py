"""The cross entropy of rows that each have their own set of possible classes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..nn.losses import target_logits

# In place of the logit of a class that a row cannot have: exp(·) is 0, and products with 0 stay finite.
_NEVER = -1e9


def masked(logits: mx.array, active: mx.array) -> mx.array:
    """`logits` (..., C) in float32 where `active` (broadcast) is true, else a value whose probability is 0."""
    return mx.where(active, logits.astype(mx.float32), _NEVER)


def masks_of(active: mx.array, contexts: mx.array) -> mx.array:
    """Rows of the table `active` (T, C) for `contexts` (B,); contexts beyond the table use its last row."""
    return mx.take(active, mx.minimum(contexts, active.shape[0] - 1), axis=0)


def row_losses(logits: mx.array, targets: mx.array, active: mx.array) -> mx.array:
    """Cross entropy of each row, (B,), over the classes in `active` (B, C)."""
    logits = masked(logits, active)
    return mx.logsumexp(logits, axis=-1) - target_logits(logits, targets)


def as_input(x: mx.array) -> mx.array:
    """Bytes are pixels, 0 … 255 → 0 … 1; everything else is what the model takes."""
    return x.astype(mx.float32) / 255 if x.dtype == mx.uint8 else x


def to_numpy(x: mx.array | np.ndarray) -> np.ndarray:
    """An array of the host, in MLX's precisions (no float64, no int64)."""
    x = np.asarray(x)
    if x.dtype == np.float64:
        return x.astype(np.float32)
    return x.astype(np.int32) if x.dtype == np.int64 else x

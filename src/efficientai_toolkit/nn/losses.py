"""Losses `loss_fn(predictions, targets) -> scalar`, and the metric that goes with the targets."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import TaskSamplingError
from ..precision import widened

LossFn = Callable[[mx.array, mx.array], mx.array]


def cross_entropy_loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross entropy of `logits` (..., C) against integer classes `targets` (...).

    Computed as logsumexp − logit of the target in float32, so half-precision logits do not overflow. NaN where a target
    is not in 0 … C − 1.

    Raises:
        TaskSamplingError: not one class for each row of logits.
    """
    if targets.shape != logits.shape[:-1]:
        raise TaskSamplingError(
            f"logits have the shape {logits.shape} and their classes {targets.shape}; expected {logits.shape[:-1]}"
        )
    logits = logits.astype(mx.float32)
    return mx.mean(mx.logsumexp(logits, axis=-1) - target_logits(logits, targets))


def target_logits(logits: mx.array, targets: mx.array) -> mx.array:
    """The logit (...) of each target (...) among `logits` (..., C); NaN where there is none.

    An index that no logit has would be read, and its gradient written, outside of the array.
    """
    known = (targets >= 0) & (targets < logits.shape[-1])
    index = mx.where(known, targets, 0).astype(mx.int32)
    return mx.where(known, mx.take_along_axis(logits, index[..., None], axis=-1).squeeze(-1), mx.nan)


def mse_loss(predictions: mx.array, targets: mx.array) -> mx.array:
    """Mean squared error; a trailing axis of size 1 that only one side has is ignored.

    Raises:
        TaskSamplingError: the shapes differ otherwise; broadcast, they would be a loss that nobody asked for.
    """
    shapes = predictions.shape, targets.shape
    if predictions.ndim == targets.ndim + 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    elif targets.ndim == predictions.ndim + 1 and targets.shape[-1] == 1:
        targets = targets.squeeze(-1)
    if predictions.shape != targets.shape:
        raise TaskSamplingError(
            f"predictions have the shape {shapes[0]} and their targets {shapes[1]}; expected the same"
        )
    return mx.mean(mx.square(widened(predictions) - widened(targets)))


def is_classification(targets: mx.array) -> bool:
    """Integer targets are classes, and so are true and false; everything else is regression."""
    return targets.dtype == mx.bool_ or mx.issubdtype(targets.dtype, mx.integer)


def default_loss(targets: mx.array) -> LossFn:
    """Cross entropy for integer targets, mean squared error for float targets."""
    return cross_entropy_loss if is_classification(targets) else mse_loss


def has_accuracy(predictions: mx.array, targets: mx.array) -> bool:
    """One class of several for each row. A loss of one's own may have others: several labels a row, one logit, …"""
    if not is_classification(targets):  # before its shape is asked for: a model may return several arrays
        return False
    return targets.shape == predictions.shape[:-1] and predictions.shape[-1] > 1


def accuracy(logits: mx.array, targets: mx.array) -> mx.array:
    """Fraction of rows whose largest logit is the target's."""
    return mx.mean((mx.argmax(logits, axis=-1) == targets).astype(mx.float32))

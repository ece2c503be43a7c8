"""What a user would do without meta-learning: fine-tune from random weights, or from weights trained on all tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..learners.fomaml import FOMAMLLearner
from ..nn.functional import clone
from ..nn.losses import LossFn
from ..runs.build import Built, build_model
from ..tasks.episode import EpisodeStack

if TYPE_CHECKING:
    from ..tasks.distribution import TaskDistribution


def untrained_model(built: Built) -> nn.Module:
    """The configured model with fresh weights, of another seed than the run began with."""
    config = built.config.model_copy(deep=True)
    config.meta_learning.seed = (config.seed + 1) % 2**32
    return build_model(config, built.splits.train.input_shape, max(split.output_dim for split in built.splits))


def joint_pretraining(
    model: nn.Module,
    tasks: TaskDistribution,
    iterations: int,
    *,
    meta_batch_size: int = 4,
    lr: float = 0.001,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    each: Callable[[int], None] | None = None,
) -> nn.Module:
    """A copy of `model`, trained on the examples of all tasks pooled, as if they were one task.

    It sees the meta-batches that a meta-learner sees, support and query alike, with the same outer optimiser
    (Adam): only adaptation is left out. (In the toolkit's terms: no inner step, and the support is part of the
    query.) Where tasks contradict each other (the sinusoids, classes that change their numbers), this learns
    their mean: that is the point of the comparison.

    Args:
        model: the start; it stays as it is.
        tasks: training tasks.
        iterations: steps.
        meta_batch_size: tasks a step.
        lr: of Adam.
        loss_fn: default by the targets.
        seed: of random layers.
        each: called with the number of steps done.
    """
    learner = FOMAMLLearner(clone(model), outer_lr=lr, num_inner_steps=0, seed=seed)
    last = None
    for iteration in range(iterations):
        metrics = learner.meta_update([_pooled(stack) for stack in tasks.batch_at(iteration, meta_batch_size)], loss_fn)
        mx.async_eval(metrics, learner.meta)
        if last is not None:
            mx.eval(last)  # at most two steps in flight
        last = metrics
        if each is not None:
            each(iteration + 1)
    return learner.model


def choose_rate(
    model: nn.Module,
    episodes: Sequence[EpisodeStack],
    rates: Sequence[float],
    num_steps: int,
    loss_fn: LossFn | None = None,
) -> float:
    """The rate of `rates` with the lowest query loss after fine-tuning on `episodes` (of validation tasks)."""
    losses = []
    for rate in rates:
        values = fine_tuner(model, rate, num_steps).evaluate_per_task(episodes, loss_fn, (num_steps,))
        loss = float(values[f"step_{num_steps}_loss"].mean())
        losses.append(loss if np.isfinite(loss) else np.inf)
    return rates[int(np.argmin(losses))]


def fine_tuner(model: nn.Module, lr: float, num_steps: int) -> FOMAMLLearner:
    """Plain fine-tuning with SGD, by the toolkit's own inner loop, on a copy of `model`."""
    return FOMAMLLearner(clone(model), inner_lr=lr, num_inner_steps=num_steps)


def _pooled(stack: EpisodeStack) -> EpisodeStack:
    sx, sy, qx, qy = stack
    return EpisodeStack(sx, sy, mx.concatenate([sx, qx], axis=1), mx.concatenate([sy, qy], axis=1))

"""Sample tasks as the arrays that plots show: inputs, targets, predictions before and after adaptation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .plots import ImageTask, PlaneTask, RegressionTask

if TYPE_CHECKING:
    from ..learners.base import MetaLearner
    from ..tasks.distribution import TaskDistribution

_GRID = 160
_DENSE = 120


def sample_tasks(
    learner: MetaLearner, tasks: TaskDistribution, count: int
) -> list[RegressionTask] | list[PlaneTask] | list[ImageTask]:
    """`count` tasks that can be shown (functions of one number, points of a plane, images), else none.

    Out of four times as many, ordered from the worst to the best adapted and taken at even distances, so that
    what is shown is typical, not lucky.
    """
    shape = tasks.input_shape
    if not mx.issubdtype(tasks.batch_at(0, 1)[0].support_x.dtype, mx.floating):
        return []  # tokens
    if not tasks.is_classification:
        if shape != (1,) or tasks.output_dim != 1:
            return []
        tasks, draw = _with_query(tasks, _DENSE), _regression
    elif shape == (2,):
        draw = _plane
    elif len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)):
        draw = _image
    else:
        return []
    drawn = tasks.batch_at(0, 4 * count)
    name = f"step_{learner.num_inner_steps}_" + ("acc" if tasks.is_classification else "loss")
    scores = learner.evaluate_per_task(drawn, None, (learner.num_inner_steps,))[name]
    worst_first = np.argsort(scores if tasks.is_classification else -scores, kind="stable")
    picked = worst_first[np.linspace(0, len(worst_first) - 1, count + 2).round().astype(int)[1:-1]]
    episodes = [episode for stack in drawn for episode in zip(*stack, strict=True)]
    return [draw(learner, *episodes[i]) for i in picked]  # type: ignore[return-value]


def _with_query(tasks: TaskDistribution, size: int) -> TaskDistribution:
    """The same tasks with `size` query points, so that they draw the whole function."""
    configs = [dataclasses.replace(config, query_size=size) for config in tasks.configs]
    return type(tasks)(configs, tasks.seed, endless=tasks.endless, families=tasks.families, stream=tasks.stream)


def _regression(learner: MetaLearner, sx: mx.array, sy: mx.array, qx: mx.array, qy: mx.array) -> RegressionTask:
    xs = np.concatenate([np.array(sx), np.array(qx)]).ravel()
    grid = np.linspace(xs.min(), xs.max(), _GRID, dtype=np.float32)
    at = mx.array(grid)[:, None]
    models = learner.adapt(sx, sy, num_steps=0), learner.adapt(sx, sy)
    before, after = (float(mx.mean(mx.square(model(qx) - qy))) for model in models)
    arrays = [np.array(array).ravel() for array in (sx, sy, qx, qy, at, *(model(at) for model in models))]
    return RegressionTask(*arrays, error=(before, after))  # pyright: ignore[reportCallIssue]


def _plane(learner: MetaLearner, sx: mx.array, sy: mx.array, qx: mx.array, qy: mx.array) -> PlaneTask:
    points = np.concatenate([np.array(sx), np.array(qx)])
    low, high = points.min(0), points.max(0)
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    xs, ys = (np.linspace(low[i], high[i], _GRID, dtype=np.float32) for i in range(2))
    grid = mx.array(np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2))
    models = learner.adapt(sx, sy, num_steps=0), learner.adapt(sx, sy)
    before, after = (np.array(mx.argmax(model(grid), -1)).reshape(_GRID, _GRID) for model in models)
    right = [float(mx.mean(mx.argmax(model(qx), -1) == qy)) for model in models]
    points, labels, others, truth = (np.array(a) for a in (sx, sy, qx, qy))
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    return PlaneTask(points, labels, others, truth, extent, before, after, (right[0], right[1]))


def _image(learner: MetaLearner, sx: mx.array, sy: mx.array, qx: mx.array, qy: mx.array) -> ImageTask:
    predicted = mx.argmax(learner.adapt(sx, sy)(qx), -1)
    return ImageTask(*(np.array(a) for a in (sx, sy, qx, qy, predicted)))

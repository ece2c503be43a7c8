"""Labels that a learner has no place for: refused, since what would be computed from them is not finite."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import TaskSamplingError
from ..nn.functional import Parameters
from ..nn.losses import is_classification
from ..tasks.episode import EpisodeStack
from .learner import Problem


def classes(problem: Problem, params: Parameters, support_y: mx.array) -> int:
    """Slots for classes, fixed for the trace: as many as the support may hold, and as the model's head has."""
    if not is_classification(support_y):
        raise TaskSamplingError("this learner is for classification: the targets must be integer classes")
    outputs = [params[path].shape[0] for path in problem.head_paths if params[path].ndim]
    return max([support_y.shape[0], *outputs])


def check_shape(part: str, labels: mx.array, more: tuple[int, ...] = ()) -> None:
    """Each example has one label, or so many as `more` says."""
    expected = labels.shape[1:2] + more
    if labels.shape[1:] != expected:
        raise TaskSamplingError(f"{part} labels have the shape {labels.shape[1:]}; expected {expected}")


def check_range(stack: EpisodeStack, count: int, owner: str, more: tuple[int, ...] = ()) -> None:
    """All labels are below `count`, and each example has one, or so many as `more` says (tokens of a text); `owner`
    says whose count that is."""
    for part, labels in (("support", stack.support_y), ("query", stack.query_y)):
        check_shape(part, labels, more)
        low, high = int(mx.min(labels)), int(mx.max(labels))
        if low < 0 or high >= count:
            raise TaskSamplingError(f"{part} labels are {low} … {high}, but {owner}: classes are 0 … {count - 1}")


def check_slots(stack: EpisodeStack, slots: int, *, query: bool, remedy: str = "") -> None:
    """Each label of a support has one of `slots`, and, where `query` says so, each of its query is among them."""
    support, asked = np.array(stack.support_y), np.array(stack.query_y)
    check_shape("support", stack.support_y)
    if support.min() < 0 or support.max() >= slots:
        raise TaskSamplingError(
            f"support labels are {support.min()} … {support.max()}, and a support of {support.shape[1]} examples "
            f"takes 0 … {slots - 1}{remedy}"
        )
    if not query:
        return
    check_shape("query", stack.query_y)
    task = np.arange(len(support))[:, None]
    having = np.zeros((len(support), slots), bool)
    having[task, support] = True
    absent = (asked < 0) | (asked >= slots) | ~having[task, np.clip(asked, 0, slots - 1)]
    if absent.any():
        first = int(absent.any(1).argmax())
        raise TaskSamplingError(
            f"query label {asked[absent][0]} is not among those of the support, {np.unique(support[first]).tolist()}"
            f"{remedy}"
        )

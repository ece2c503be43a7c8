"""One set of trained weights a context: one adapter a task, where the model carries adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError, TaskSamplingError
from ..nn.functional import Parameters, functional, trainable, update
from ..nn.head import features_of, find_head
from .learner import ContinualLearner, checked
from .loss import as_input

_ROWS = 1024


class SeparateLearner:
    """Every context trains its own copy of the trainable weights, from where the first one started.

    With adapters attached (and the head trained with them) this is one adapter a task; with nothing frozen it is one
    network a task. Nothing is forgotten, and memory grows with the contexts. Where the context of a test row is not
    known it is routed to the context whose mean is nearest, in the features of the model as it was before training.

    Args:
        model: see `ContinualLearner`.
        settings: of the `ContinualLearner` that trains each copy.
    """

    name = "separate"

    def __init__(self, model: nn.Module, **settings: Any):
        self.model, self.settings = model, settings
        self._start = trainable(model)
        self.weights: list[Parameters] = []
        self.means: list[mx.array] = []
        self._units: list[mx.array] = []
        self._apply = functional(model)
        try:
            features = features_of(model, find_head(model))
            self._features: Callable[[mx.array], mx.array] = lambda x: features(self._start, as_input(x))
        except ModelError:
            self._features = lambda x: as_input(x).reshape(x.shape[0], -1)

    @property
    def learned(self) -> int:
        return len(self.weights)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all copies but one."""
        return sum(a.nbytes for weights in self.weights[1:] for a in weights.values())

    @property
    def num_parameters(self) -> int:
        return sum(a.size for weights in self.weights or [self._start] for a in weights.values())

    def learn_task(self, x: Any, y: Any) -> dict[str, float]:
        """Learn one more context: `x` (N, …), `y` (N,) classes."""
        return self.learn(x, y)

    def learn(
        self,
        x: Any,
        y: Any,
        *,
        active: np.ndarray | None = None,
        each: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """See `ContinualLearner.learn`. Of `active` only the outputs that occur in `y` are trained."""
        x, y = checked(x, y)
        update(self.model, self._start)
        learner = ContinualLearner(self.model, **{**self.settings, "seed": self.settings.get("seed", 0) + self.learned})
        units = None
        if active is not None:
            row = np.asarray(active, bool)[min(self.learned, len(active) - 1)]
            units = row & (learner.kind == "domain" or np.isin(np.arange(len(row)), y))
        self.weights.append(self._start)
        self.means.append(_mean(self._features, x))
        self._units.append(mx.array([True]) if units is None else mx.array(units))

        def here(step: int) -> None:
            self.weights[-1] = trainable(self.model)
            if each is not None:
                each(step)

        metrics = learner.learn(x, y, active=None if units is None else units[None], each=here if each else None)
        self.weights[-1] = trainable(self.model)
        return metrics

    def route(self, x: Any) -> np.ndarray:
        """The context (N,) that each row of `x` seems to be of."""
        features = self._features(mx.array(x)).astype(mx.float32)
        means = mx.stack(self.means)
        distance = mx.sum(mx.square(means), axis=-1) - 2 * features.reshape(len(x), -1) @ means.T
        return np.array(mx.argmin(distance, axis=-1))

    def evaluate(self, x: Any, y: Any, active: Any = None, context: int | None = None) -> float:
        """Accuracy on (`x`, `y`) of the given context's weights, or of those that each row is routed to."""
        x, y = checked(x, y)
        if not self.weights:
            return _share_correct(self._apply, self._start, x, y, mx.array([True]) if active is None else active)
        if context is not None and context >= self.learned:
            context = self.learned - 1  # not learned yet: the latest weights are all there is
            return _share_correct(
                self._apply, self.weights[context], x, y, mx.array([True]) if active is None else active
            )
        if context is not None:
            return _share_correct(self._apply, self.weights[context], x, y, self._units[context])
        correct = 0.0
        for first in range(0, len(y), _ROWS):
            part_x, part_y = x[first : first + _ROWS], y[first : first + _ROWS]
            routes = self.route(part_x)
            for number in np.unique(routes).tolist():
                mine = routes == number
                share = _share_correct(
                    self._apply, self.weights[number], part_x[mine], part_y[mine], self._units[number]
                )
                correct += share * mine.sum()
        return float(correct) / len(y)

    def predict(self, x: Any, context: int) -> mx.array:
        """Logits (N, C) of the weights of a context."""
        if not 0 <= context < self.learned:
            raise TaskSamplingError(f"context {context} was not learned; there are {self.learned}, from 0 on")
        return self._apply(self.weights[context], as_input(mx.array(x)))

    def state(self) -> dict[str, mx.array]:
        """Every array that a checkpoint between two contexts needs."""
        arrays = {f"start/{path}": a for path, a in self._start.items()}
        for number, weights in enumerate(self.weights):
            arrays |= {f"weights/{number}/{path}": a for path, a in weights.items()}
            arrays |= {f"means/{number}": self.means[number], f"units/{number}": self._units[number]}
        return arrays

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """What `state` gave."""
        self._start = {path: arrays[f"start/{path}"] for path in self._start}
        count = sum(name.startswith("means/") for name in arrays)
        self.weights = [{path: arrays[f"weights/{n}/{path}"] for path in self._start} for n in range(count)]
        self.means = [arrays[f"means/{n}"] for n in range(count)]
        self._units = [arrays[f"units/{n}"] for n in range(count)]


def _mean(features: Callable[[mx.array], mx.array], x: np.ndarray) -> mx.array:
    total = mx.array(0.0)
    for first in range(0, len(x), _ROWS):
        rows = features(mx.array(x[first : first + _ROWS])).astype(mx.float32)
        total = total + mx.sum(rows.reshape(rows.shape[0], -1), axis=0)
        mx.eval(total)
    return total / len(x)


def _share_correct(apply: Callable, params: Parameters, x: np.ndarray, y: np.ndarray, active: Any) -> float:
    correct = 0
    for first in range(0, len(y), _ROWS):
        logits = apply(params, as_input(mx.array(x[first : first + _ROWS])))
        picked = mx.argmax(mx.where(mx.array(active), logits, -mx.inf), axis=-1)
        correct += int(np.array(picked == mx.array(y[first : first + _ROWS])).sum())
    return correct / len(y)

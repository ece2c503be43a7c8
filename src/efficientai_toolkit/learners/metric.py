"""Learners whose fast state is not weights share: embeddings, classes as slots, distances, labels of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ModelError, TaskSamplingError
from ..nn.conv import custom_function
from ..nn.elementwise import stacks
from ..nn.functional import Parameters, trainable
from ..nn.head import find_head
from ..precision import widened
from ..tasks.episode import Episode, as_array
from .base import MetaLearner
from .learner import Problem

DISTANCES = ("euclidean", "cosine")
BELOW = 20.0  # by how much the logit of a class that the support lacks is below all others: a probability of 2e-9


def embedder(model: nn.Module, head: str | None, size: int | None = None) -> Callable[..., mx.array]:
    """`embed(problem, params, x, *, key=None)` (N, D): the model's features where it says which they are (a method
    `features`, or a named head), else its output: then the model is an encoder. D must be `size`, where that is given.
    """
    has_features = hasattr(model, "features") or head is not None

    def embed(problem: Problem, params: Parameters, x: mx.array, *, key: mx.array | None = None) -> mx.array:
        z = (problem.features if has_features else problem.apply)(params, x, key=key)
        z = z.reshape(z.shape[0], -1)
        if size is not None and z.shape[1] != size:
            raise ModelError(f"embedding_dim is {size}, and {type(model).__name__} gives {z.shape[1]} numbers")
        return z

    return embed


def embedding_size(model: nn.Module, head: str | None) -> int:
    """D of `embedder`: what goes into the head of a model with features, what comes out of an encoder's last layer."""
    path = find_head(model, head)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # a frozen model's head, too
    shape = weights.get(f"{path}.weight", mx.array(0)).shape
    if len(shape) != 2:
        raise ModelError(f"the size of the embedding cannot be told from {path!r}; give embedding_dim=…")
    return shape[1] if hasattr(model, "features") or head is not None else shape[0]


def head_shape(model: nn.Module, head: str | None) -> tuple[str, str]:
    """Paths of the head's weight (outputs, inputs) and bias (outputs,)."""
    path = find_head(model, head)
    weight, bias = f"{path}.weight", f"{path}.bias"
    shapes = {name: value.shape for name, value in trainable(model).items()}
    if len(shapes.get(weight, ())) != 2 or bias not in shapes:
        raise ModelError(f"the head {path!r} must be a trainable nn.Linear with a bias")
    return weight, bias


def one_hot(y: mx.array, count: int) -> mx.array:
    """(N,) classes → (N, `count`)"""
    return (y[:, None] == mx.arange(count)).astype(mx.float32)


def present(support: mx.array) -> mx.array:
    """(C,) whether the support (S, C), one-hot, has an example of the class."""
    return mx.sum(support, axis=0) > 0


def rule_out(logits: mx.array, having: mx.array) -> mx.array:
    """`logits` (N, C) with classes that are not `present` (C,) below all others, by a finite amount."""
    lowest = mx.min(mx.where(having, logits, mx.inf), axis=-1, keepdims=True)
    return mx.where(having, logits, mx.stop_gradient(lowest) - BELOW)


def class_means(z: mx.array, support: mx.array) -> mx.array:
    """Mean embedding of each class: (S, D), one-hot (S, C) → (C, D); zero for a class that is absent."""
    return (support.T @ _wide(z)) / mx.maximum(mx.sum(support, axis=0), 1)[:, None]


@custom_function
def _from_float16(x):
    return x.astype(mx.float32)


@_from_float16.vjp
def _(_x, cotangent, _output):
    # That of the cosine of a zero row is beyond float16: infinite, and times the zero of a dead ReLU not a number.
    return mx.clip(cotangent, -65504, 65504).astype(mx.float16)


stacks(_from_float16)


def _wide(x: mx.array) -> mx.array:
    """`widened`, with gradients that float16 holds."""
    return _from_float16(x) if x.dtype == mx.float16 else widened(x)


def unit(x: mx.array) -> mx.array:
    """Rows of length 1 (a zero row stays zero), in float32."""
    x = _wide(x)
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + 1e-12)


def cosine_head(z: mx.array, support: mx.array, scale: mx.array | float) -> tuple[mx.array, mx.array]:
    """Weight (C, D) and bias (C,) of a linear head whose logits are `scale` · cosine(z, class mean), up to each
    embedding's own length beside the mean one; a class that is absent is `scale` below.

    Args:
        z: (S, D) embeddings.
        support: (S, C) their classes, one-hot.
        scale: of the logits.
    """
    z = _wide(z)
    size = mx.mean(mx.sqrt(mx.sum(mx.square(z), axis=-1) + 1e-12))
    return (scale / size) * unit(class_means(z, support)), mx.where(present(support), 0.0, -scale)


def squared_distances(a: mx.array, b: mx.array) -> mx.array:
    """(N, D), (M, D) → (N, M), in float32"""
    a, b = _wide(a), _wide(b)
    return mx.sum(mx.square(a), -1)[:, None] - 2 * a @ b.T + mx.sum(mx.square(b), -1)


def coded(support_y: Any, *others: Any) -> tuple[np.ndarray, list[mx.array]]:
    """The distinct labels (C,) of a support set, integers or strings, and each set of labels as places among them."""
    given = [np.asarray(labels) for labels in (support_y, *others)]
    for labels in given:
        if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
            what = f"{labels.ndim}-dimensional" if labels.ndim != 1 else f"of type {labels.dtype}"
            raise TaskSamplingError(f"labels are {what}; expected one integer or string an example")
    names = np.unique(given[0])
    if not len(names):
        raise TaskSamplingError("the support is empty; at least one example is needed")
    places = []
    for labels in given:
        place = np.minimum(np.searchsorted(names, labels), len(names) - 1)
        if not np.array_equal(names[place], labels):
            missing = next(x for x in labels.ravel() if x not in names)
            raise TaskSamplingError(f"label {missing!r} of the query is not among those of the support: {list(names)}")
        places.append(mx.array(place.astype(np.int32)))
    return names, places


class MetricLearner(MetaLearner):
    """A learner whose fast state is made of the support's embeddings: no inner steps, labels of any kind."""

    adapts_by_steps = False
    only = "classification"
    has_slots = True
    other_labels = "; for labels of any kind use classify and train_episodes"

    def train_episodes(
        self, episodes: Sequence[Sequence[Any]], *, meta_batch_size: int = 1, num_iterations: int | None = None
    ) -> dict[str, list[float]]:
        """Meta-train on episodes (support_x, support_y, query_x, query_y) whose labels are any integers or strings.

        Args:
            episodes: arrays of MLX or NumPy; the labels may be lists.
            meta_batch_size: episodes an outer step.
            num_iterations: outer steps; default: one pass.

        Returns:
            every metric's history, one value an outer step.
        """
        ready = []
        for number, episode in enumerate(episodes):
            if len(episode) != 4:
                raise TaskSamplingError(
                    f"episode {number} has {len(episode)} parts; expected (support_x, support_y, query_x, query_y)"
                )
            sx, sy, qx, qy = episode
            _, (support_y, query_y) = coded(sy, qy)
            ready.append(Episode(mx.array(sx), support_y, mx.array(qx), query_y))
        return self.meta_train(ready, num_iterations=num_iterations, meta_batch_size=meta_batch_size)

    def classify(self, query_samples: Any, support_samples: Any, support_labels: Any) -> np.ndarray:
        """The label, one of `support_labels`, of each query sample.

        Args:
            query_samples: (Q, *input).
            support_samples: (S, *input).
            support_labels: (S,) any integers or strings.

        Returns:
            (Q,) labels.
        """
        support_x, query_x = as_array(support_samples), as_array(query_samples)
        names, (support_y,) = coded(support_labels)
        if not query_x.size:
            raise TaskSamplingError("classify was given no query samples; at least one is needed")
        logits = self.adapt(support_x, support_y)(query_x)
        return names[np.array(mx.argmax(logits, axis=-1))]

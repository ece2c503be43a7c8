"""What the synthetic classification families share: labels, and a plane in the input space where the classes lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import TaskSamplingError
from .base import Arrays, Draw, Family, Shape, TaskConfig, number, where
from .seeding import normal, uniform


class PlanarFamily(Family):
    """Classes that differ within a plane of the input space; the other directions are standard normal noise.

    In two dimensions the plane is the input space; in more, it is drawn from the task's seed. Labels are balanced
    to within one example, in support and query alike, so a support set of at least `num_classes` examples shows
    every class.

    Settings (`task_params`), each drawn from the task's seed where not given:
        rotation_angle: of the classes within the plane, in radians.
        translation: of the inputs; one number for every dimension, or one a dimension.
        label_noise: the share of labels, in support and query, that are replaced by another class; 0.
    """

    known_params = frozenset({"rotation_angle", "translation", "label_noise"})
    translation_scale = 0.1  # standard deviation, within the plane, of a translation that is drawn

    def shape(self, config: TaskConfig) -> Shape:
        if config.num_classes < 2 or config.input_dim < 2:
            raise TaskSamplingError(
                f"{where(config)}: {config.num_classes} classes in {config.input_dim} dimensions; "
                "expected at least 2 of each"
            )
        return Shape((config.input_dim,), (), config.support_size, config.query_size)

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        return {
            "angle": np.array([number(c, "rotation_angle", np.nan) for c in configs]),
            "translation": np.array([_translation(c) for c in configs]),
            "label_noise": np.array([number(c, "label_noise", 0.0, 0.0, 1.0) for c in configs]),
        }

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        dim = settings["translation"].shape[1]
        angle, translation = settings["angle"], settings["translation"]
        angle = np.where(np.isnan(angle), 2 * np.pi * uniform(seeds, "rotation_angle")[:, 0], angle)
        plane = _planes(seeds, dim)
        drawn = np.einsum("tk,tdk->td", self.translation_scale * normal(seeds, "translation", 2), plane)
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # (T, 2, 2)
        return {
            "plane": plane @ rotation,  # (T, D, 2): a point of the classes' own plane → input
            "translation": np.where(np.isnan(translation), drawn, translation),
            "label_noise": settings["label_noise"],
        }

    def points(self, labels: np.ndarray, num_classes: int, tasks: Arrays, rng: np.random.Generator) -> np.ndarray:
        """Labels (T, N) → points of those classes in the classes' own plane, (T, N, 2)."""
        raise NotImplementedError

    def draw(self, config: TaskConfig, tasks: Arrays, rng: np.random.Generator) -> Draw:
        n_support, n = config.support_size, config.support_size + config.query_size
        count, ways = len(tasks["plane"]), config.num_classes
        labels = np.concatenate(
            [balanced_labels(count, n_support, ways, rng), balanced_labels(count, n - n_support, ways, rng)], 1
        )
        z, plane = self.points(labels, ways, tasks, rng), tasks["plane"]
        if config.input_dim == 2:
            x = z @ plane.swapaxes(1, 2)
        else:
            x = rng.standard_normal((count, n, config.input_dim))
            x += (z - x @ plane) @ plane.swapaxes(1, 2)
        x = (x + tasks["translation"][:, None]).astype(np.float32)
        if tasks["label_noise"].any():
            wrong = rng.random((count, n)) < tasks["label_noise"][:, None]
            labels = np.where(wrong, (labels + rng.integers(1, ways, (count, n))) % ways, labels)
        y = labels.astype(np.int32)
        return x[:, :n_support], y[:, :n_support], x[:, n_support:], y[:, n_support:]


def balanced_labels(count: int, n: int, ways: int, rng: np.random.Generator) -> np.ndarray:
    """(`count`, `n`) labels in random order, the classes of each row equally often to within one."""
    labels = (np.arange(n) + rng.integers(ways, size=(count, 1))) % ways
    if n % ways and ways > 2:  # which classes come once more: any of them, not neighbours only
        labels = np.take_along_axis(rng.permuted(np.tile(np.arange(ways), (count, 1)), axis=1), labels, 1)
    return rng.permuted(labels, axis=1)


def _planes(seeds: np.ndarray, dim: int) -> np.ndarray:
    """(T, `dim`, 2) with orthonormal columns; the identity in two dimensions."""
    if dim == 2:
        return np.broadcast_to(np.eye(2), (len(seeds), 2, 2))
    return np.linalg.qr(normal(seeds, "plane", 2 * dim).reshape(-1, dim, 2))[0]


def _translation(config: TaskConfig) -> np.ndarray:
    value = config.task_params.get("translation")
    if value is None:
        return np.full(config.input_dim, np.nan)
    try:
        array = np.asarray(value, np.float64)
        if not np.isfinite(array).all():
            raise ValueError
        return np.broadcast_to(array, (config.input_dim,))
    except (TypeError, ValueError):
        raise TaskSamplingError(
            f"{where(config)}: translation is {value!r}; expected a number, or {config.input_dim} of them"
        ) from None

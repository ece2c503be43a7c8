"""What the regression families share: functions of one number, with parameters drawn from ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..errors import TaskSamplingError, did_you_mean
from .base import Arrays, Draw, Family, Shape, TaskConfig, interval, number
from .episode import Episode
from .seeding import uniform

Ranges = Mapping[str, tuple[float, float]]


class RegressionFamily(Family):
    """Tasks y = f(x; parameters) + noise. A subclass gives `ranges` and `function`, and is complete.

    Args:
        x_range: inputs are uniform in it.
        noise: standard deviation of the normal noise on the targets of support and query.
        support_size, query_size, seed: for `sample_episode` and `sample_batch`.
        **ranges: (low, high), or a number, for any of the class's `ranges`.

    `task_params` of a task take the same names, `x_range` and `noise` included.
    """

    classification = False
    ranges: ClassVar[Ranges] = {}  # parameters, uniform in their range

    def __init__(
        self,
        *,
        x_range: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.0,
        support_size: int = 10,
        query_size: int = 10,
        seed: int = 0,
        **ranges: float | tuple[float, float],
    ):
        for name in ranges:
            if name not in self.ranges:
                raise TaskSamplingError(
                    f"{type(self).__name__} has no parameter {name!r}{did_you_mean(name, self.ranges)}"
                )
        given: dict[str, Any] = {"x_range": x_range, "noise": noise, **ranges}
        defaults = TaskConfig("defaults", type(self).__name__, task_params=given)
        self.given = {name: interval(defaults, name, default) for name, default in self.ranges.items()}
        self.x_range, self.noise = interval(defaults, "x_range", x_range), number(defaults, "noise", 0.0, 0.0)
        self.known_params = frozenset({*self.ranges, "x_range", "noise"})
        self.support_size, self.query_size, self.seed = support_size, query_size, seed
        self._tasks = None

    def function(self, x: np.ndarray, p: Arrays) -> np.ndarray:
        """(T, N, 1) inputs, each task's parameters as (T, 1, 1) → (T, N, 1) targets without noise"""
        raise NotImplementedError

    def inputs(self, p: Arrays, n: int, rng: np.random.Generator) -> np.ndarray:
        """(T, `n`, 1) inputs for an episode"""
        low, high = p["x_low"], p["x_high"]
        return low + (high - low) * rng.random((len(low), n, 1))

    def shape(self, config: TaskConfig) -> Shape:
        return Shape((1,), (1,), config.support_size, config.query_size)

    def cell(self, config: TaskConfig) -> Shape:
        return self.shape(config)

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        ranges = {
            name: np.array([interval(c, name, default) for c in configs])
            for name, default in {**self.given, "x_range": self.x_range}.items()
        }
        return ranges | {"noise": np.array([number(c, "noise", self.noise, 0.0) for c in configs])}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        p = {"x_low": settings["x_range"][:, 0], "x_high": settings["x_range"][:, 1], "noise": settings["noise"]}
        for name in self.ranges:
            low, high = settings[name].T
            p[name] = low + (high - low) * uniform(seeds, name)[:, 0]
        return p

    def draw(self, config: TaskConfig, tasks: Arrays, rng: np.random.Generator) -> Draw:
        n_support = config.support_size
        p = {name: value[:, None, None] for name, value in tasks.items()}
        x = self.inputs(p, n_support + config.query_size, rng)
        y = self.function(x, p)
        if tasks["noise"].any():
            y = y + p["noise"] * rng.standard_normal(x.shape)
        x, y = x.astype(np.float32), y.astype(np.float32)
        return x[:, :n_support], y[:, :n_support], x[:, n_support:], y[:, n_support:]

    # For use without configurations

    def distribution(self, num_tasks: int | None = None, *, stream: str = ""):
        """A `TaskDistribution` of this family: `num_tasks` tasks, or fresh ones without end."""
        from .distribution import TaskDistribution

        name = type(self).__name__
        configs = [
            TaskConfig(f"{name}_{i}", name, 1, 1, self.support_size, self.query_size) for i in range(num_tasks or 1)
        ]
        endless = num_tasks is None
        return TaskDistribution(configs, self.seed, endless=endless, families={name: self}, stream=stream)

    def sample_batch(self, n: int) -> Episode:
        """The next `n` fresh tasks, one episode each, stacked; never those of `distribution()`."""
        if self._tasks is None:
            self._tasks = self.distribution(stream="samples")
        return self._tasks.sample_batch(n)[0]

    def sample_episode(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """An episode of a fresh task: (support_x, support_y, query_x, query_y)."""
        return Episode(*(part[0] for part in self.sample_batch(1)))

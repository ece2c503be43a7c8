"""What a task is, and the small protocol that every family of tasks implements."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import TaskSamplingError, did_you_mean

Arrays = dict[str, np.ndarray]
Draw = tuple[np.ndarray, ...]  # support_x, support_y, query_x, query_y


@dataclass(frozen=True)
class TaskConfig:
    """One task, or, in an endless distribution, the template of fresh tasks.

    Args:
        task_id: its name, unique in a distribution.
        task_family: a name in `FAMILIES`.
        num_classes: classes (the way of an image family); regression families ignore it.
        input_dim: size of an input of the synthetic classification families; other families have their own.
        support_size: support examples, all classes together. Image and text families speak of
            `task_params["k_shot"]` and `task_params["query_per_class"]` instead.
        query_size: query examples, all classes together.
        task_params: settings of the family. `seed` fixes what is not set; left out, it is derived from
            `task_id` and the distribution's seed.
    """

    task_id: str
    task_family: str
    num_classes: int = 2
    input_dim: int = 2
    support_size: int = 5
    query_size: int = 50
    task_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("task_id", "task_family"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise TaskSamplingError(f"{name} is {value!r}; expected a name")
        for name in ("num_classes", "input_dim", "support_size", "query_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise TaskSamplingError(
                    f"task {self.task_id!r}: {name} is {value!r}; expected a whole number, at least 1"
                )
        if not isinstance(self.task_params, Mapping):
            raise TaskSamplingError(f"task {self.task_id!r}: task_params is {self.task_params!r}; expected a mapping")


class Shape(NamedTuple):
    """The shape of an episode."""

    input: tuple[int, ...]
    target: tuple[int, ...]  # () for classes
    support: int
    query: int


class Family:
    """One kind of task. Subclasses draw many tasks at once, without a loop over tasks.

    A distribution calls `settings` once, `tasks` once (or, when endless, for every block of fresh tasks) and
    `draw` for every block of episodes. All three are pure: what they return depends on their arguments alone.
    `config` is any configuration of the cell that the vector of tasks belongs to.
    """

    classification = True
    input_type: type[np.generic] = np.float32
    way_and_shot = False  # whether sizes are spoken of as n_way, k_shot and query_per_class
    known_params: frozenset[str] = frozenset()

    @classmethod
    def open(cls, data_dir: Path | None = None) -> Family:
        """The family, for those that read data from `data_dir`, its folder of data sets."""
        return cls()

    def shape(self, config: TaskConfig) -> Shape:
        """The shape of the task's episodes."""
        raise NotImplementedError

    def cell(self, config: TaskConfig) -> Hashable:
        """Tasks with equal cells are drawn together, as one vector."""
        return self.shape(config), config.num_classes

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        """What the configurations of one cell fix, checked: arrays with a leading axis over `configs`."""
        raise NotImplementedError

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        """(T,) seeds, and the settings of each → all that makes the T tasks what they are, with a leading axis T."""
        raise NotImplementedError

    def draw(self, config: TaskConfig, tasks: Arrays, rng: np.random.Generator) -> Draw:
        """An episode of fresh points for each of T tasks.

        Returns support_x (T, S, *input) of `input_type`, support_y (T, S) int32 or (T, S, *target) float32, and the
        same two for the query.
        """
        raise NotImplementedError

    def pack(self, config: TaskConfig, draw: Draw) -> Draw:
        """What `draw` gave for the tasks of one batch, before it goes to the device; texts drop common padding."""
        return draw

    def restrict(self, config: TaskConfig, start: float, stop: float) -> TaskConfig:
        """The task kept to one share of the family's classes, for families whose tasks share classes."""
        return config

    def check_params(self, config: TaskConfig) -> None:
        """Raise on a setting that the family does not have."""
        known = self.known_params | {"seed"}
        seed = config.task_params.get("seed")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
            raise TaskSamplingError(f"{where(config)}: seed is {seed!r}; expected a whole number")
        for name in config.task_params:
            if name not in known:
                raise TaskSamplingError(f"{where(config)}: unknown task parameter {name!r}{did_you_mean(name, known)}")


def number(config: TaskConfig, name: str, default: float, low: float = -math.inf, high: float = math.inf):
    """The finite number `task_params[name]`, in [`low`, `high`]; `default` where it is not given."""
    value = config.task_params.get(name)
    if value is None:
        return default
    if not _finite(value) or not low <= value <= high:
        bounds = "" if (low, high) == (-math.inf, math.inf) else f" in [{low:g}, {high:g}]"
        raise TaskSamplingError(f"{where(config)}: {name} is {value!r}; expected a number{bounds}")
    return float(value)


def interval(config: TaskConfig, name: str, default: tuple[float, float]) -> tuple[float, float]:
    """`task_params[name]` as (low, high): a number fixes it, a pair is the range that tasks draw it from."""
    value = config.task_params.get(name)
    if value is None:
        return default
    if _finite(value):
        return float(value), float(value)
    if isinstance(value, Sequence) and len(value) == 2 and all(map(_finite, value)) and value[0] <= value[1]:
        return float(value[0]), float(value[1])
    raise TaskSamplingError(f"{where(config)}: {name} is {value!r}; expected a number or a pair low ≤ high")


def choice(config: TaskConfig, name: str, options: Sequence[str]) -> int:
    """The position of `task_params[name]` in `options`, −1 where it is not given."""
    value = config.task_params.get(name)
    if value is None:
        return -1
    if value not in options:
        raise TaskSamplingError(f"{where(config)}: unknown {name} {value!r}{did_you_mean(value, options)}")
    return options.index(value)


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def where(config: TaskConfig) -> str:
    return f"task {config.task_id!r} ({config.task_family})"

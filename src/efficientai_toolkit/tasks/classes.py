"""N-way K-shot classification out of a data set sorted by class: what the image and the text families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import TaskSamplingError
from .base import Arrays, Draw, Family, Shape, TaskConfig, choice, where
from .seeding import stable_seed, uniform
from .storage import data_root


class Sorted(Protocol):
    """Examples sorted by class; class c is the rows starts[c] to starts[c + 1]."""

    @property
    def starts(self) -> np.ndarray: ...  # (classes + 1,)

    @property
    def names(self) -> list[str]: ...  # of the classes

    @property
    def splits(self) -> dict[str, np.ndarray]: ...  # split → classes, in an order without meaning


class ClassFamily(Family):
    """N-way K-shot classification. A task is an ordered choice of `num_classes` classes.

    Support and query share no example.

    Args:
        data_dir: the folder that holds one folder a data set; left out, `$EFFICIENTAI_DATA_DIR`, else the cache.

    Settings (`task_params`):
        k_shot, query_per_class: examples of each class; left out, `support_size` and `query_size` are shared out.
        split: train, val or test, which have no class in common.
        part: (start, stop), the share of the split's classes to keep to; what `split_tasks` sets.
        labels: "task", a class's place in the task; or "split", its number among the classes that tasks are drawn from,
            the same in every task, for joint training.
    """

    way_and_shot = True
    known_params = frozenset({"k_shot", "query_per_class", "split", "part", "labels"})
    examples = "examples"  # what one is called, in errors

    def __init__(self, data_dir: str | Path | None = None):
        self.data_dir = data_dir
        self._sets: dict[tuple, Any] = {}

    @classmethod
    def open(cls, data_dir: Path | None = None) -> ClassFamily:
        return cls(data_dir)

    @property
    def root(self) -> Path:
        return data_root(self.data_dir)

    def variant(self, config: TaskConfig) -> tuple:
        """Arguments of `read` that settings of the task decide."""
        return ()

    def read(self, *variant: Any) -> Sorted:
        """The data set."""
        raise NotImplementedError

    def data_set(self, config: TaskConfig) -> Any:
        """The data set, read once."""
        variant = self.variant(config)
        if variant not in self._sets:
            self._sets[variant] = self.read(*variant)
        return self._sets[variant]

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        """Of one example."""
        raise NotImplementedError

    def gather(self, config: TaskConfig, rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """rows (T, way, n) of the data set, of classes (T, way) → inputs (T, way, n, *input)"""
        raise NotImplementedError

    def copies(self, config: TaskConfig) -> int:
        """How many classes of tasks one class of the data set makes (an image turned is a class of its own)."""
        return 1

    def shape(self, config: TaskConfig) -> Shape:
        way = config.num_classes
        shot = _per_class(config, "k_shot", config.support_size)
        query = _per_class(config, "query_per_class", config.query_size)
        return Shape(self.input_shape(config), (), way * shot, way * query)

    def cell(self, config: TaskConfig) -> tuple:
        return (
            self.shape(config),
            config.num_classes,
            self._split(config),
            _part(config),
            self.copies(config),
            self.variant(config),
            _by_split(config),
        )

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        config = configs[0]
        pool = self._pool(config)
        way, data = config.num_classes, self.data_set(config)
        if len(pool) < 2:
            raise TaskSamplingError(
                f"{where(config)}: its split {self._split(config)!r} has {len(pool)} of the data set's "
                f"{len(data.names) * self.copies(config)} classes, and a task needs at least 2; add classes"
            )
        if way < 2 or way > len(pool):
            raise TaskSamplingError(
                f"{where(config)}: {way} classes asked for; expected 2 to {len(pool)}, the classes of its "
                f"split {self._split(config)!r}"
            )
        shape = self.shape(config)
        need = (shape.support + shape.query) // way
        classes = np.unique(pool // self.copies(config))
        sizes = np.diff(data.starts)[classes]
        if sizes.min() < need:
            name = data.names[classes[sizes.argmin()]]
            raise TaskSamplingError(
                f"{where(config)}: class {name!r} has {sizes.min()} {self.examples}, and an episode needs {need} of "
                f"each class ({shape.support // way} support + {shape.query // way} query)"
            )
        return {}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        pool = self._pool(config)
        return {"classes": pool[distinct(seeds, config.num_classes, len(pool))]}

    def draw(self, config: TaskConfig, tasks: Arrays, rng: np.random.Generator) -> Draw:
        data, shape, way = self.data_set(config), self.shape(config), config.num_classes
        classes = tasks["classes"]  # (T, way)
        shot, base = shape.support // way, classes // self.copies(config)
        starts, sizes = data.starts[base], data.starts[base + 1] - data.starts[base]
        scores = rng.random((*classes.shape, int(sizes.max())), np.float32)
        if sizes.min() < sizes.max():
            scores[np.arange(scores.shape[-1]) >= sizes[..., None]] = 2
        rows = starts[..., None] + first(scores, shot + shape.query // way)
        examples = self.gather(config, rows, classes)  # (T, way, shot + query, *input)
        numbers = self._numbers(config, classes) if _by_split(config) else np.arange(way)
        labels = np.broadcast_to(numbers.astype(np.int32)[..., None], rows.shape)
        draw = []
        for part in (slice(None, shot), slice(shot, None)):
            x = self.finish(examples[:, :, part])
            draw += [x.reshape(len(x), -1, *shape.input), labels[:, :, part].reshape(len(x), -1)]
        return tuple(draw)

    def finish(self, x: np.ndarray) -> np.ndarray:
        """Stored examples as inputs of a model."""
        return x

    def restrict(self, config: TaskConfig, start: float, stop: float) -> TaskConfig:
        low, high = _part(config)
        part = [low + (high - low) * start, low + (high - low) * stop]
        return dataclasses.replace(config, task_params={**config.task_params, "part": part})

    def _split(self, config: TaskConfig) -> str:
        splits = tuple(self.data_set(config).splits)
        return splits[max(choice(config, "split", splits), 0)]

    def _pool(self, config: TaskConfig) -> np.ndarray:
        """The classes that the task is drawn from, copies among them."""
        classes = self.data_set(config).splits[self._split(config)]
        low, high = (round(share * len(classes)) for share in _part(config))
        copies = self.copies(config)
        return (classes[low:high, None] * copies + np.arange(copies)).ravel()

    def _numbers(self, config: TaskConfig, classes: np.ndarray) -> np.ndarray:
        """Places of `classes` in the pool."""
        pool = self._pool(config)
        order = np.argsort(pool)
        return order[np.searchsorted(pool, classes, sorter=order)]

    def num_labels(self, config: TaskConfig) -> int:
        """Labels are below it."""
        return len(self._pool(config)) if _by_split(config) else config.num_classes

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_sets": {}}


def shuffled(n: int, name: str) -> np.ndarray:
    """A fixed permutation of 0…n − 1, the same with every version of NumPy."""
    return np.argsort(uniform(np.array([stable_seed(name)], np.uint64), "order", n)[0], kind="stable")


def distinct(seeds: np.ndarray, n: int, pool: int) -> np.ndarray:
    """(T,) seeds → (T, `n`) different numbers below `pool`, in random order."""
    if pool < 8 * n:
        return first(uniform(seeds, "classes", pool), n)
    # The first n different numbers of a longer sequence: its length does not grow with the pool.
    drawn = (pool * uniform(seeds, "classes", 3 * n)).astype(np.int64)
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, 1)
    again = np.zeros(drawn.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    found = np.take_along_axis(drawn, np.argsort(again, axis=1, kind="stable")[:, :n], 1)
    few = np.nonzero((~again).sum(1) < n)[0]
    if len(few):
        found[few] = first(uniform(seeds[few], "classes", pool), n)
    return found


def first(scores: np.ndarray, n: int) -> np.ndarray:
    """The places of the `n` smallest along the last axis, in random order where the scores are random."""
    if n >= scores.shape[-1]:
        return np.argsort(scores, axis=-1)
    places = np.argpartition(scores, n, axis=-1)[..., :n]
    return np.take_along_axis(places, np.argsort(np.take_along_axis(scores, places, -1), axis=-1), -1)


def _per_class(config: TaskConfig, name: str, total: int) -> int:
    value = config.task_params.get(name)
    if value is None:
        if total % config.num_classes:
            raise TaskSamplingError(
                f"{where(config)}: {total} examples cannot be shared out over {config.num_classes} classes; "
                f"set task_params[{name!r}]"
            )
        return total // config.num_classes
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TaskSamplingError(f"{where(config)}: {name} is {value!r}; expected a whole number, at least 1")
    return value


def _by_split(config: TaskConfig) -> bool:
    return choice(config, "labels", ("task", "split")) == 1


def _part(config: TaskConfig) -> tuple[float, float]:
    part = config.task_params.get("part")
    if part is None:
        return 0.0, 1.0
    try:
        low, high = map(float, part)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise TaskSamplingError(f"{where(config)}: part is {part!r}; expected two shares 0 ≤ start < stop ≤ 1")
    return low, high

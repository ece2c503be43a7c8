"""What the image families share: images by class, and N-way K-shot episodes sliced out of one array."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, TaskSamplingError
from .base import Arrays, Draw, Family, Shape, TaskConfig, choice, where
from .seeding import stable_seed, uniform
from .storage import data_root


class ImageSet(NamedTuple):
    """Images sorted by class."""

    images: np.ndarray  # (M, H, W, C) uint8
    starts: np.ndarray  # (classes + 1,): class c is images[starts[c]:starts[c + 1]]
    names: list[str]  # of the classes
    splits: dict[str, np.ndarray]  # split → classes, in an order without meaning

    @classmethod
    def from_labels(
        cls, images: np.ndarray, labels: np.ndarray, names: list[str], splits: dict[str, np.ndarray]
    ) -> ImageSet:
        """Images in any order with their labels, numbers into `names`."""
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(names) + 1))
        return cls(images[order], starts, names, splits)


class ImageFamily(Family):
    """N-way K-shot classification of images. A task is an ordered choice of `num_classes` classes.

    Inputs are (H, W, C) float32 in [0, 1]; the label is the place of the class in the task; support and query
    share no image.

    Args:
        data_dir: the folder that holds one folder a data set; left out, `$EFFICIENTAI_DATA_DIR`, else the cache.

    Settings (`task_params`):
        k_shot, query_per_class: examples of each class; left out, `support_size` and `query_size` are shared out.
        split: train, val or test, which have no class in common.
        rotations: whether a class turned by 90°, 180° or 270° is a class of its own.
        part: (start, stop), the share of the split's classes to keep to; what `split_tasks` sets.
    """

    way_and_shot = True
    known_params = frozenset({"k_shot", "query_per_class", "split", "rotations", "part"})
    rotations = False  # whether a class turned by 90°, 180° or 270° is a class of its own

    def __init__(self, data_dir: str | Path | None = None):
        self.data_dir = data_dir
        self._sets: dict[tuple, ImageSet] = {}

    @classmethod
    def open(cls, data_dir: Path | None = None) -> ImageFamily:
        return cls(data_dir)

    @property
    def root(self) -> Path:
        return data_root(self.data_dir)

    def variant(self, config: TaskConfig) -> tuple:
        """Arguments of `read` that settings of the task decide."""
        return ()

    def read(self, *variant: Any) -> ImageSet:
        """The data set."""
        raise NotImplementedError

    def image_set(self, config: TaskConfig) -> ImageSet:
        """The data set, read once."""
        variant = self.variant(config)
        if variant not in self._sets:
            self._sets[variant] = self.read(*variant)
        return self._sets[variant]

    def shape(self, config: TaskConfig) -> Shape:
        way = config.num_classes
        shot = _per_class(config, "k_shot", config.support_size)
        query = _per_class(config, "query_per_class", config.query_size)
        return Shape(self.image_set(config).images.shape[1:], (), way * shot, way * query)

    def cell(self, config: TaskConfig) -> tuple:
        return (
            self.shape(config),
            config.num_classes,
            self._split(config),
            _part(config),
            self._turns(config),
            self.variant(config),
        )

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        config = configs[0]
        pool = self._pool(config)
        way, data = config.num_classes, self.image_set(config)
        if way < 2 or way > len(pool):
            raise TaskSamplingError(
                f"{where(config)}: {way} classes asked for; expected 2 to {len(pool)}, the classes of its "
                f"split {self._split(config)!r}"
            )
        shape = self.shape(config)
        need = (shape.support + shape.query) // way
        classes = np.unique(pool // self._turns(config))
        sizes = np.diff(data.starts)[classes]
        if sizes.min() < need:
            name = data.names[classes[sizes.argmin()]]
            raise TaskSamplingError(
                f"{where(config)}: class {name!r} has {sizes.min()} images, and an episode needs {need} of each "
                f"class ({shape.support // way} support + {shape.query // way} query)"
            )
        return {}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        pool = self._pool(config)
        return {"classes": pool[_distinct(seeds, config.num_classes, len(pool))]}

    def draw(self, config: TaskConfig, tasks: Arrays, rng: np.random.Generator) -> Draw:
        data, shape, way = self.image_set(config), self.shape(config), config.num_classes
        classes, turns = tasks["classes"], self._turns(config)  # (T, way)
        shot, base = shape.support // way, classes // turns
        starts, sizes = data.starts[base], data.starts[base + 1] - data.starts[base]
        scores = rng.random((*classes.shape, int(sizes.max())), np.float32)
        if sizes.min() < sizes.max():
            scores[np.arange(scores.shape[-1]) >= sizes[..., None]] = 2
        rows = starts[..., None] + _first(scores, shot + shape.query // way)
        images = data.images.take(rows, axis=0)  # (T, way, shot + query, H, W, C)
        for turn in range(1, turns):
            turned = classes % turns == turn
            images[turned] = np.rot90(images[turned], turn, axes=(2, 3))
        labels = np.broadcast_to(np.arange(way, dtype=np.int32)[:, None], rows.shape)
        draw = []
        for part in (slice(None, shot), slice(shot, None)):
            x = np.multiply(images[:, :, part], np.float32(1 / 255), dtype=np.float32)
            draw += [x.reshape(len(x), -1, *shape.input), labels[:, :, part].reshape(len(x), -1)]
        return tuple(draw)

    def restrict(self, config: TaskConfig, start: float, stop: float) -> TaskConfig:
        low, high = _part(config)
        part = [low + (high - low) * start, low + (high - low) * stop]
        return dataclasses.replace(config, task_params={**config.task_params, "part": part})

    def _split(self, config: TaskConfig) -> str:
        splits = tuple(self.image_set(config).splits)
        return splits[max(choice(config, "split", splits), 0)]

    def _pool(self, config: TaskConfig) -> np.ndarray:
        """The classes that the task is drawn from, rotations among them."""
        classes = self.image_set(config).splits[self._split(config)]
        low, high = (round(share * len(classes)) for share in _part(config))
        turns = self._turns(config)
        return (classes[low:high, None] * turns + np.arange(turns)).ravel()

    def _turns(self, config: TaskConfig) -> int:
        value = config.task_params.get("rotations", self.rotations)
        if not isinstance(value, bool):
            raise TaskSamplingError(f"{where(config)}: rotations is {value!r}; expected true or false")
        return 4 if value else 1

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_sets": {}}


def shuffled(n: int, name: str) -> np.ndarray:
    """A fixed permutation of 0…n − 1, the same with every version of NumPy."""
    return np.argsort(uniform(np.array([stable_seed(name)], np.uint64), "order", n)[0], kind="stable")


def decode(data: bytes, name: str, size: tuple[int, int], mode: str) -> np.ndarray:
    """An image file as (H, W, C) uint8, resized with Lanczos' anti-aliasing filter; `mode` is "L" or "RGB"."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert(mode)
            if image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
            return np.asarray(image, np.uint8).reshape(*size, -1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not an image that can be read ({error})") from None


def _distinct(seeds: np.ndarray, n: int, pool: int) -> np.ndarray:
    """(T,) seeds → (T, `n`) different numbers below `pool`, in random order."""
    if pool < 8 * n:
        return _first(uniform(seeds, "classes", pool), n)
    # The first n different numbers of a longer sequence: its length does not grow with the pool.
    drawn = (pool * uniform(seeds, "classes", 3 * n)).astype(np.int64)
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, 1)
    again = np.zeros(drawn.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    found = np.take_along_axis(drawn, np.argsort(again, axis=1, kind="stable")[:, :n], 1)
    few = np.nonzero((~again).sum(1) < n)[0]
    if len(few):
        found[few] = _first(uniform(seeds[few], "classes", pool), n)
    return found


def _first(scores: np.ndarray, n: int) -> np.ndarray:
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

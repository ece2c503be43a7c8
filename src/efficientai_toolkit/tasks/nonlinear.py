"""Classes that no hyperplane divides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Arrays, TaskConfig, choice
from .planar import PlanarFamily
from .seeding import uniform

KINDS = ("xor", "circles", "spiral", "moons")


class NonlinearClassification(PlanarFamily):
    """Exclusive or, rings, spiral arms or half-moons, for any number of classes.

    `xor` is a chequerboard of C × C squares whose class is (row + column) mod C; `circles` are C rings, `spiral` C
    arms, `moons` a chain of C half-moons that open up and down in turn. A task turns and shifts them; in `circles`,
    where a turn changes nothing, class 0 is always the innermost, so much is known without any support.

    Settings (`task_params`): `kind` and those of `PlanarFamily`, drawn from the task's seed where not given.
    """

    known_params = PlanarFamily.known_params | {"kind"}
    translation_scale = 0.3

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        return super().settings(configs) | {"kind": np.array([choice(c, "kind", KINDS) for c in configs])}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        kind = settings["kind"]
        drawn = (len(KINDS) * uniform(seeds, "kind")[:, 0]).astype(np.int64)
        return super().tasks(config, settings, seeds) | {"kind": np.where(kind < 0, drawn, kind)}

    def points(self, labels: np.ndarray, num_classes: int, tasks: Arrays, rng: np.random.Generator) -> np.ndarray:
        z = np.empty((*labels.shape, 2))
        for number, draw in enumerate((_xor, _circles, _spiral, _moons)):
            where = np.nonzero(tasks["kind"] == number)[0]
            if len(where):
                z[where] = draw(labels[where], num_classes, rng)
        return z


def _xor(labels: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    row = rng.integers(ways, size=labels.shape)
    column = (labels - row) % ways
    return (np.stack([column, row], -1) + rng.random((*labels.shape, 2))) * (4 / ways) - 2


def _circles(labels: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    radius = (labels + 1) * (2 / ways) + rng.normal(0, 0.2 / ways, labels.shape)
    return _polar(radius, 2 * np.pi * rng.random(labels.shape))


def _spiral(labels: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    along = np.sqrt(rng.random(labels.shape))  # evenly spread over the arm's length
    z = _polar(2 * along, 2 * np.pi * (labels / ways + 0.75 * along))
    return z + rng.normal(0, 0.1, z.shape)


def _moons(labels: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    along = np.pi * rng.random(labels.shape)
    up = np.where(labels % 2 == 0, 1, -1)
    x = np.cos(along) + labels - (ways - 1) / 2
    y = up * (np.sin(along) - 0.25)
    return np.stack([x, y], -1) + rng.normal(0, 0.1, (*labels.shape, 2))


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)

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
    arms, `moons` a chain of C half-moons that open up and down in turn. Which of the C places carries which label
    is rotated by an amount drawn from the task's seed, so that support is needed to tell.

    Settings (`task_params`): `kind` and those of `PlanarFamily`, drawn from the task's seed where not given.
    """

    known_params = PlanarFamily.known_params | {"kind"}

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        return super().settings(configs) | {"kind": np.array([choice(c, "kind", KINDS) for c in configs])}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        kind = settings["kind"]
        drawn = (len(KINDS) * uniform(seeds, "kind")[:, 0]).astype(np.int64)
        shift = (settings["num_classes"] * uniform(seeds, "label order")[:, 0]).astype(np.int64)
        return super().tasks(config, settings, seeds) | {"kind": np.where(kind < 0, drawn, kind), "shift": shift}

    def points(self, labels: np.ndarray, num_classes: int, tasks: Arrays, rng: np.random.Generator) -> np.ndarray:
        places = (labels + tasks["shift"][:, None]) % num_classes
        z = np.empty((*labels.shape, 2))
        for number, draw in enumerate((_xor, _circles, _spiral, _moons)):
            where = np.nonzero(tasks["kind"] == number)[0]
            if len(where):
                z[where] = draw(places[where], num_classes, rng)
        return z


def _xor(places: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    row = rng.integers(ways, size=places.shape)
    column = (places - row) % ways
    return (np.stack([column, row], -1) + rng.random((*places.shape, 2))) * (4 / ways) - 2


def _circles(places: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    radius = (places + 1) * (2 / ways) + rng.normal(0, 0.2 / ways, places.shape)
    return _polar(radius, 2 * np.pi * rng.random(places.shape))


def _spiral(places: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    along = np.sqrt(rng.random(places.shape))  # evenly spread over the arm's length
    z = _polar(2 * along, 2 * np.pi * (places / ways + 0.75 * along))
    return z + rng.normal(0, 0.1, z.shape)


def _moons(places: np.ndarray, ways: int, rng: np.random.Generator) -> np.ndarray:
    along = np.pi * rng.random(places.shape)
    up = np.where(places % 2 == 0, 1, -1)
    x = np.cos(along) + places - (ways - 1) / 2
    y = up * (np.sin(along) - 0.25)
    return np.stack([x, y], -1) + rng.normal(0, 0.1, (*places.shape, 2))


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)

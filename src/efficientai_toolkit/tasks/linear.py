"""Linearly separable classes."""

from __future__ import annotations

import numpy as np

from .base import Arrays
from .planar import PlanarFamily


class LinearClassification(PlanarFamily):
    """Classes divided by random hyperplanes through, or by a small translation near, the origin.

    Class k is the sector of a random plane around the angle `rotation_angle` + 2πk / `num_classes`; with two
    classes that is a random hyperplane. Inputs are standard normal, so neighbouring classes touch.
    Settings: those of `PlanarFamily`.
    """

    def points(self, labels: np.ndarray, num_classes: int, tasks: Arrays, rng: np.random.Generator) -> np.ndarray:
        # A standard normal point within its own class's sector: radius and angle are independent.
        angle = 2 * np.pi / num_classes * (labels + rng.random(labels.shape) - 0.5)
        radius = np.sqrt(2 * rng.standard_exponential(labels.shape))
        return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)

"""Sums of two sine waves (Lacoste et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Arrays, TaskConfig
from .regression import Ranges, RegressionFamily
from .seeding import normal, uniform


class Harmonic(RegressionFamily):
    """y = a₁ sin(ωx + b₁) + a₂ sin(2ωx + b₂) + noise, with x normal around a centre of the task's own.

    As in Lacoste et al., *Uncertainty in Multitask Transfer Learning* (2018): ω in [5, 7], b₁ and b₂ in [0, 2π],
    a₁ and a₂ standard normal, x ~ N(centre, 1) with the centre in [−4, 4]. `x_range` is the centre's range.
    """

    ranges: ClassVar[Ranges] = {"frequency": (5.0, 7.0), "phase_1": (0.0, 2 * np.pi), "phase_2": (0.0, 2 * np.pi)}

    def __init__(self, *, x_range: tuple[float, float] = (-4.0, 4.0), **settings):
        super().__init__(x_range=x_range, **settings)

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        p = super().tasks(config, settings, seeds)
        amplitudes = normal(seeds, "amplitudes", 2)
        low, high = settings["x_range"].T
        centre = low + (high - low) * uniform(seeds, "centre")[:, 0]
        return p | {"amplitude_1": amplitudes[:, 0], "amplitude_2": amplitudes[:, 1], "centre": centre}

    def inputs(self, p: Arrays, n: int, rng: np.random.Generator) -> np.ndarray:
        return p["centre"] + rng.standard_normal((len(p["centre"]), n, 1))

    def function(self, x: np.ndarray, p: Arrays) -> np.ndarray:
        first = p["amplitude_1"] * np.sin(p["frequency"] * x + p["phase_1"])
        return first + p["amplitude_2"] * np.sin(2 * p["frequency"] * x + p["phase_2"])

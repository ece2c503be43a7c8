"""The sinusoids of Finn et al. (2017), and the base of regression tasks of your own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import Arrays
from .regression import Ranges, RegressionFamily


class SinusoidalTaskGenerator(RegressionFamily):
    """y = amplitude · sin(frequency · x − phase) + noise.

    The defaults are the protocol of Finn, Abbeel & Levine, *Model-Agnostic Meta-Learning* (2017): amplitude in
    [0.1, 5], phase in [0, π], frequency 1, x in [−5, 5], no noise. Each may be a number or a range.

    A family of your own overrides `function` and, for other parameters, `ranges`:

        >>> class Sawtooth(SinusoidalTaskGenerator):
        ...     ranges = {"amplitude": (0.1, 5.0), "period": (2.0, 4.0)}
        ...     def function(self, x, p):
        ...         return p["amplitude"] * (x / p["period"] % 1)
        >>> Sawtooth(amplitude=(1, 2), seed=3).sample_batch(4).support_x.shape
        (4, 10, 1)
        >>> tasks = Sawtooth(support_size=5).distribution()  # a TaskDistribution to train on
    """

    ranges: ClassVar[Ranges] = {"amplitude": (0.1, 5.0), "phase": (0.0, np.pi), "frequency": (1.0, 1.0)}

    def function(self, x: np.ndarray, p: Arrays) -> np.ndarray:
        return p["amplitude"] * np.sin(p["frequency"] * x - p["phase"])

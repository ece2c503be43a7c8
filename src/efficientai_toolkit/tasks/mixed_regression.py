"""Sines, lines and parabolas in one distribution: tasks of several modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..errors import TaskSamplingError, did_you_mean
from .base import Arrays, TaskConfig, where
from .regression import Ranges, RegressionFamily
from .seeding import uniform

KINDS = ("sine", "line", "quadratic")
SINE_LINE = {"kinds": ["sine", "line"], "noise": 0.3}  # task_params of the PLATIPUS and LEO experiments


class MixedRegression(RegressionFamily):
    """Sines, lines and parabolas, each kind equally likely.

    Sine: amplitude · sin(x − phase); line: slope · x + intercept; quadratic: ±curvature · (x − centre)² + intercept.
    Ranges as in Finn, Xu & Levine, *Probabilistic MAML* (2018) and Rusu et al., *LEO* (2019), who mix sines and
    lines with noise 0.3 (`task_params=SINE_LINE`), and for the parabolas Vuorio et al., *Multimodal MAML* (2019).

    Settings (`task_params`): `kinds`, a list of kinds or one of them, and those of `RegressionFamily`.
    """

    ranges: ClassVar[Ranges] = {
        "amplitude": (0.1, 5.0),
        "phase": (0.0, np.pi),
        "slope": (-3.0, 3.0),
        "intercept": (-3.0, 3.0),
        "curvature": (0.02, 0.15),
        "centre": (-3.0, 3.0),
    }

    def __init__(self, *, kinds: str | Sequence[str] = KINDS, **settings):
        super().__init__(**settings)
        self.kinds = _kinds(TaskConfig("defaults", type(self).__name__, task_params={"kinds": kinds}), KINDS)
        self.known_params |= {"kinds"}

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        allowed = np.array([[kind in _kinds(c, self.kinds) for kind in KINDS] for c in configs])
        return super().settings(configs) | {"kinds": allowed}

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        allowed = settings["kinds"]
        rank = (allowed.sum(1) * uniform(seeds, "kind")[:, 0]).astype(np.int64)
        kind = (np.cumsum(allowed, 1) > rank[:, None]).argmax(1)  # the rank-th allowed kind
        sign = np.where(uniform(seeds, "sign")[:, 0] < 0.5, -1.0, 1.0)
        return super().tasks(config, settings, seeds) | {"kind": kind, "sign": sign}

    def function(self, x: np.ndarray, p: Arrays) -> np.ndarray:
        sine = p["amplitude"] * np.sin(x - p["phase"])
        line = p["slope"] * x + p["intercept"]
        quadratic = p["sign"] * p["curvature"] * (x - p["centre"]) ** 2 + p["intercept"]
        return np.select([p["kind"] == 0, p["kind"] == 1], [sine, line], quadratic)


def _kinds(config: TaskConfig, default: Sequence[str]) -> Sequence[str]:
    kinds = config.task_params.get("kinds")
    if kinds is None:
        return default
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, Sequence) or not kinds:
        raise TaskSamplingError(f"{where(config)}: kinds is {kinds!r}; expected some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise TaskSamplingError(f"{where(config)}: unknown kind {kind!r}{did_you_mean(kind, KINDS)}")
    return kinds

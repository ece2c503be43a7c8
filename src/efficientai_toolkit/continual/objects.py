"""Continual learners as plain objects: a model goes in, tasks are learned one after the other."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .ewc import ElasticWeights
from .learner import ContinualLearner
from .replay import Replay


class EWC(ContinualLearner):
    """Elastic weight consolidation around a model; see `ElasticWeights`.

    Args:
        model: a classifier, changed in place.
        ewc_lambda: strength of the penalty.
        fisher_scale: multiplies the Fisher information.
        settings: of `ContinualLearner`.

    >>> ewc = EWC(model, ewc_lambda=1000)
    >>> ewc.learn_task(x, y, previous_tasks=[(old_x, old_y)])
    """

    def __init__(self, model: nn.Module, ewc_lambda: float = 1000.0, fisher_scale: float = 1.0, **settings: Any):
        super().__init__(model, ElasticWeights(ewc_lambda, fisher_scale=fisher_scale), **settings)


class ExperienceReplay(ContinualLearner):
    """Rehearsal from a bounded memory around a model; see `Replay`.

    Args:
        model: a classifier, changed in place.
        memory_size: examples kept.
        policy: "reservoir", "ring" or "balanced".
        settings: of `ContinualLearner`.

    >>> replay = ExperienceReplay(model, memory_size=200)
    >>> replay.learn_task(x, y)
    """

    def __init__(self, model: nn.Module, memory_size: int = 1000, policy: str = "reservoir", **settings: Any):
        super().__init__(model, Replay(memory_size, policy=policy), **settings)

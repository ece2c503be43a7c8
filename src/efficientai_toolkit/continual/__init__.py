"""Continual learning: one context after the other, without forgetting.

A new strategy is one file and one line in `STRATEGIES`.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import mlx.nn as nn

from ..errors import ConfigurationError, did_you_mean

STRATEGIES: dict[str, str] = {
    "naive": "naive:Naive",
    "joint": "naive:Joint",
    "class-means": "class_means:ClassMeansLearner",
    "ewc": "ewc:ElasticWeights",
    "online-ewc": "ewc:OnlineElasticWeights",
    "si": "si:SynapticIntelligence",
    "lwf": "lwf:LearningWithoutForgetting",
    "replay": "replay:Replay",
    "agem": "agem:AveragedGEM",
    "derpp": "der:DarkReplay",
    "progressive": "progressive:ProgressiveNetwork",
    "separate": "separate:SeparateLearner",
}


def strategy_class(name: str) -> type:
    """The class of a strategy: `strategy_class("si")` is `SynapticIntelligence`."""
    if name not in STRATEGIES:
        raise ConfigurationError(f"unknown strategy {name!r}{did_you_mean(name, STRATEGIES)}")
    module, _, attribute = STRATEGIES[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)


def build_learner(name: str, model: nn.Module, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A learner by the name of its strategy; names joined by "+" compose, as in "ewc+replay".

    Args:
        name: of `STRATEGIES`.
        model: what learns; of "progressive" only its number of outputs and its inputs matter.
        options: of the strategies, by their names where several are joined: {"ewc": {"ewc_lambda": 10}}.
        settings: of `ContinualLearner`.
    """
    from .learner import ContinualLearner
    from .strategy import Strategy

    parts = name.split("+")
    classes = {part: strategy_class(part) for part in parts}
    if len(classes) < len(parts):
        raise ConfigurationError(f"{name!r} joins a strategy with itself; name each part once")
    if len(parts) > 1 and (alone := [part for part in parts if part in ("naive", "joint")]):
        raise ConfigurationError(f"{alone[0]!r} is learning without a strategy, which cannot be joined in {name!r}")
    if len(classes) == 1 and not issubclass(classes[name], Strategy):
        if name == "progressive":
            return classes[name](None, **{"hidden_size": 100, **(options or {})}, **settings)
        if options:
            raise ConfigurationError(f"strategy {name!r} has no option {next(iter(options))!r}")
        return classes[name](model, **settings)
    strategies = []
    for part, kind in classes.items():
        if not issubclass(kind, Strategy):
            raise ConfigurationError(
                f"{part!r} changes the network itself and cannot be joined with others in {name!r}"
            )
        own = (options or {}) if len(classes) == 1 else (options or {}).get(part, {})
        known = list(inspect.signature(kind).parameters)
        for option in own:
            if option not in known:
                raise ConfigurationError(f"strategy {part!r} has no option {option!r}{did_you_mean(option, known)}")
        strategies.append(kind(**own))
    return ContinualLearner(model, strategies, **settings)

"""Batch statistics that a support set leaves to its queries: an answer then depends on nothing else that is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

Moments = tuple[mx.array, mx.array]  # mean and biased variance, (C,) each
Statistics = dict[int, Moments]  # by the identity of the normalising module

_NAMES = ("mean", "variance")
_recording: list[Statistics] = []
_given: list[Mapping[int, Moments]] = []


@contextlib.contextmanager
def recorded() -> Iterator[Statistics]:
    """What every `EpisodicBatchNorm` normalises by within it; of a module that is called twice, the last."""
    _recording.append({})
    try:
        yield _recording[-1]
    finally:
        _recording.pop()


@contextlib.contextmanager
def given(statistics: Mapping[int, Moments]) -> Iterator[None]:
    """Within it, an `EpisodicBatchNorm` that `statistics` names normalises by them, and not by its batch."""
    _given.append(statistics)
    try:
        yield
    finally:
        _given.pop()


def given_to(module: nn.Module) -> Moments | None:
    """What `module` is to normalise by, where the innermost `given` says it, or `keep` did."""
    found = _given[-1].get(id(module)) if _given else None
    return module.get("_moments") if found is None else found


def record(module: nn.Module, mean: mx.array, variance: mx.array) -> None:
    """Tell the innermost `recorded`, if there is one."""
    if _recording:
        _recording[-1][id(module)] = mean, variance


def by_batch(module: nn.Module) -> bool:
    """Whether `module` normalises by its batch and nobody asks by what: then it may be a part of a fused operation."""
    return not _recording and given_to(module) is None


def by_path(model: nn.Module, statistics: Mapping[int, Moments]) -> dict[str, mx.array]:
    """`statistics` as arrays `PATH.mean` and `PATH.variance`, by the modules' paths in `model`, for a file."""
    return {
        f"{path}.{name}": moment
        for path, module in model.named_modules()
        if id(module) in statistics
        for name, moment in zip(_NAMES, statistics[id(module)], strict=True)
    }


def by_module(model: nn.Module, arrays: Mapping[str, mx.array]) -> Statistics:
    """`by_path`, back."""
    return {
        id(module): (arrays[f"{path}.mean"], arrays[f"{path}.variance"])
        for path, module in model.named_modules()
        if f"{path}.mean" in arrays
    }


def keep(model: nn.Module, statistics: Mapping[int, Moments]) -> None:
    """From now on the modules of `model` that `statistics` names normalise by them."""
    for module in model.modules():
        if id(module) in statistics:
            module._moments = statistics[id(module)]

"""What continual learning is judged by, from the accuracy matrix R.

R[i, j] is the accuracy on the test set of context j after contexts 0 … i have been learned. A row that was not
measured is NaN. Reference: Lopez-Paz & Ranzato (2017), GEM; Chaudhry et al. (2018), RWalk; Riemer et al. (2019), MER.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def average_accuracy(matrix: ArrayLike) -> float:
    """mean_j R[T, j]"""
    return float(np.mean(np.asarray(matrix, float)[-1]))


def backward_transfer(matrix: ArrayLike) -> float:
    """mean over j < T of R[T, j] − R[j, j]; negative is forgetting. NaN for one context."""
    r = np.asarray(matrix, float)
    return float(np.mean(r[-1, :-1] - np.diag(r)[:-1])) if len(r) > 1 else float("nan")


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike) -> float:
    """mean over j > 0 of R[j − 1, j] − b_j, b (T,) the accuracies before any context was learned."""
    r = np.asarray(matrix, float)
    if len(r) < 2:
        return float("nan")
    return float(np.mean(np.diag(r, 1) - np.asarray(untrained, float)[1:]))


def forgetting(matrix: ArrayLike) -> float:
    """mean over j < T of max_{i < T} R[i, j] − R[T, j] (Chaudhry et al. 2018)."""
    r = np.asarray(matrix, float)
    return float(np.mean(np.max(r[:-1, :-1], axis=0) - r[-1, :-1])) if len(r) > 1 else float("nan")


def learning_accuracy(matrix: ArrayLike) -> float:
    """mean_j R[j, j]: how well each context was learned when its turn came."""
    return float(np.mean(np.diag(np.asarray(matrix, float))))


def steps_to(steps: Sequence[int], accuracies: ArrayLike, target: float) -> int | None:
    """The first of `steps` at which `accuracies` reach `target`, or None."""
    reached = np.flatnonzero(np.asarray(accuracies, float) >= target)
    return int(steps[reached[0]]) if len(reached) else None


def adaptation_speed(curves: Sequence[Mapping[str, Sequence[float]]], share: float = 0.9) -> float | None:
    """Mean over contexts of the steps to `share` of the accuracy that the context ends with.

    Args:
        curves: of each context, {"steps": …, "accuracy": …}.
    """
    counts = [steps_to(c["steps"], c["accuracy"], share * c["accuracy"][-1]) for c in curves]  # type: ignore[arg-type]
    found = [count for count in counts if count is not None]
    return float(np.mean(found)) if found else None


def summary(matrix: ArrayLike, untrained: ArrayLike | None = None) -> dict[str, float | None]:
    """All of them; None where a value does not exist."""
    values = {
        "average_accuracy": average_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": float("nan") if untrained is None else forward_transfer(matrix, untrained),
        "forgetting": forgetting(matrix),
        "learning_accuracy": learning_accuracy(matrix),
    }
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def by_seed(runs: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """ "STRATEGY/seedN" → record, in whatever order: strategy → N → record, in the order of N."""
    found: dict[str, dict[int, Any]] = {}
    for key, record in runs.items():
        name, _, seed = key.rpartition("/seed")
        found.setdefault(name, {})[int(seed)] = record
    return {name: dict(sorted(mine.items())) for name, mine in found.items()}


def values_by_seed(runs: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, list[float | None]]:
    """strategy → a value for each seed that any strategy has, so that they pair; None where there is none."""
    found = by_seed(runs)
    seeds = sorted({seed for mine in found.values() for seed in mine})
    return {name: [mine.get(seed, {}).get(metric) for seed in seeds] for name, mine in found.items()}

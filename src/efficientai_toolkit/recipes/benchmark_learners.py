"""What the meta-step of each learner costs beside MAML's, on a small network and on images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..backbones.conv4 import StridedConv4
from ..devices import select_device
from ..errors import ModelError, TaskSamplingError, ToolkitError
from ..learners import LEARNERS, learner_class
from ..learners.base import MetaLearner
from ..learners.maml import MAMLLearner
from ..tasks.episode import EpisodeStack
from .benchmark import (
    Batches,
    Timing,
    Workload,
    default_device_kept,
    devices_of,
    in_turns,
    machine,
    seconds_of,
    sinusoid,
)


def characters(
    learner: Callable[..., MetaLearner] = MAMLLearner, *, count: int = 8, **options: Any
) -> tuple[MetaLearner, Batches]:
    """Random black and white images in Omniglot's shape, `count` tasks of 5-way 1-shot with five query images a class,
    strided Conv-4 of 32 filters, 5 inner steps unless `options` say otherwise."""
    rng = np.random.default_rng(0)
    support, query = (mx.array((rng.random((count, n, 28, 28, 1)) < 0.2).astype(np.float32)) for n in (5, 25))
    labels = [mx.tile(mx.repeat(mx.arange(5), n), (count, 1)) for n in (1, 5)]
    stack = EpisodeStack(support, labels[0], query, labels[1])
    options = {"inner_lr": 0.1, "outer_lr": 0.001, "num_inner_steps": 5, **options}
    return learner(StridedConv4(hidden_dim=32), **options), lambda index: [stack]


class Comparison(NamedTuple):
    """A workload that every learner can be put to.

    Args:
        title: what it is.
        tasks: in a meta-batch.
        make: (learner class, **options) → the learner and its meta-batches.
        options: of learners whose defaults are for something else, or take more than five inner steps.
    """

    title: str
    tasks: int
    make: Callable[..., tuple[MetaLearner, Batches]]
    options: Mapping[str, dict[str, Any]]


# Of a learner whose steps change on the way, those that it takes most of.
LATER = {"maml++, annealed": ("maml++", {"multi_step_iterations": 0})}
_FIVE_STEPS = {"num_inner_steps": 4, "finetune_steps": 1}  # of LEO: in the code, and of the weights
COMPARISONS = {
    "sinusoid": Comparison(
        "sinusoids, 25 tasks × (10 + 10), MLP 1-40-40-1, 5 inner steps",
        25,
        sinusoid,
        {"leo": {"decodes": "all", **_FIVE_STEPS}},
    ),
    "images": Comparison(
        "images of 28 × 28, 8 tasks × (5 + 25), strided Conv-4 of 32 filters, 5 inner steps",
        8,
        characters,
        {"leo": _FIVE_STEPS},
    ),
}


def compare_learners(
    *,
    device: str | None = None,
    seconds: float | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The meta-step of every learner that adapts by steps, relative to MAML's.

    MAML and the learner take turns, block by block; `ratio` is the median of the blocks' ratios.

    Args:
        device: as in `benchmark`.
        seconds: of timing, a learner and workload.
        quick: small and short: it shows that everything runs, and no more.
        only: names of `COMPARISONS`; all where empty.
        each: called with every row as it comes.
    """
    for name in only:
        if name not in COMPARISONS:
            raise ToolkitError(f"learners are compared on {' and '.join(COMPARISONS)}, not on {name!r}")
    seconds = seconds_of(seconds, quick)
    rows: list[dict[str, Any]] = []
    with default_device_kept():
        select_device(devices_of(device)[0])
        for workload in only or COMPARISONS:
            for name in sorted([*LEARNERS, *LATER]):
                row = _beside_maml(name, COMPARISONS[workload], seconds)
                if row is not None:
                    rows.append({"workload": workload, **row})
                    if each is not None:
                        each(rows[-1])
        about = machine()
    titles = {name: COMPARISONS[name].title for name in only or COMPARISONS}
    return {**about, "workloads": titles, "seconds": seconds, "learners": rows}


def _beside_maml(name: str, comparison: Comparison, seconds: float) -> dict[str, Any] | None:
    """None of a learner that does not adapt by steps, or not such a task."""
    algorithm, options = LATER.get(name, (name, comparison.options.get(name, {})))
    made = learner_class(algorithm)
    if not made.adapts_by_steps:
        return None
    work = Workload(name, "", comparison.tasks, lambda: comparison.make(made, **options))
    try:
        timings = [Timing(work, seconds / 30), Timing(work._replace(make=comparison.make), seconds / 30)]
    except (TaskSamplingError, ModelError):
        return None
    own, reference = in_turns(timings, seconds)
    ratios = [a / b for a, b in zip(own.times, reference.times, strict=True)]
    return {
        "name": name,
        "options": options,
        **own.figures(),
        "maml_ms": reference.figures()["ms"],
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }

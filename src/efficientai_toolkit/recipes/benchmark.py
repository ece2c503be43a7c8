"""The standard workloads on this machine: how long a meta-step takes, and what memory it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import __version__
from ..backbones.conv4 import Conv4
from ..backbones.mlp import MLP, SimpleClassifier
from ..devices import device_info, gpu_kind, select_device
from ..errors import ToolkitError
from ..learners.base import MetaLearner
from ..learners.maml import MAMLLearner
from ..learners.reptile import ReptileLearner
from ..tasks.distribution import TaskConfig, TaskDistribution
from ..tasks.episode import EpisodeStack

Batches = Callable[[int], list[EpisodeStack]]  # iteration -> the meta-batch


class Workload(NamedTuple):
    """A learner and its meta-batches, made anew for every measurement."""

    name: str
    title: str
    tasks: int
    make: Callable[[], tuple[MetaLearner, Batches]]


def sinusoid(learner: Callable[..., MetaLearner] = MAMLLearner, **options: Any) -> tuple[MetaLearner, Batches]:
    """Finn's sinusoids, 25 tasks × (10 + 10), MLP 1-40-40-1, 5 inner steps unless `options` say otherwise."""
    config = TaskConfig("sinusoid", "sinusoid", num_classes=1, input_dim=1, support_size=10, query_size=10)
    tasks = TaskDistribution([config], endless=True)
    options = {"inner_lr": 0.001, "outer_lr": 0.001, "num_inner_steps": 5, **options}
    return learner(MLP(1, 1, 40, 2), **options), lambda index: tasks.batch_at(index, 25)


def images(count: int) -> tuple[MetaLearner, Batches]:
    """Conv-4 with 64 filters, 5-way 1-shot with one query image a class, 1 inner step, second order."""
    rng = np.random.default_rng(0)
    pixels = [mx.array((rng.random((count, 5, 28, 28, 1)) < 0.2).astype(np.float32)) for _ in range(2)]
    labels = mx.tile(mx.arange(5), (count, 1))
    stack = EpisodeStack(pixels[0], labels, pixels[1], labels)
    return MAMLLearner(Conv4(), 0.4, 0.001, 1), lambda index: [stack]


def planes(hidden: int, meta_batch: int, query: int) -> tuple[MetaLearner, Batches]:
    """Reptile on random linear tasks in two dimensions, meta_batch × (5 + query), 5 inner steps."""
    config = TaskConfig("linear", "linear_classification", support_size=5, query_size=query)
    tasks = TaskDistribution([config], endless=True)
    model = SimpleClassifier(2, hidden, 2, 2)
    return ReptileLearner(model, 0.01, 0.001, 5), lambda index: tasks.batch_at(index, meta_batch)


def workloads(quick: bool = False) -> list[Workload]:
    """The three of `benchmarks/`, then the sizes that the published figures are for; tasks are drawn as they go."""
    count = 2 if quick else 32
    conv4 = f"MAML, Conv-4 with 64 filters, {count} tasks × (5 + 5) images, 1 step, second order"
    standard = [
        Workload("sinusoid", "MAML, sinusoids, 25 tasks × (10 + 10), MLP 1-40-40-1, 5 steps", 25, sinusoid),
        Workload("conv4", conv4, count, lambda: images(count)),
        Workload("reptile", "Reptile, 4 tasks × (5 + 20), MLP 2-64-64-2, 5 steps", 4, lambda: planes(64, 4, 20)),
    ]
    sizes = [
        Workload(
            f"hidden {hidden}, meta-batch {batch}",
            f"Reptile, {batch} tasks × (5 + 50), MLP 2-{hidden}-{hidden}-2, 5 steps",
            batch,
            lambda hidden=hidden, batch=batch: planes(hidden, batch, 50),
        )
        for hidden in (64, 256)
        for batch in (4, 8)
    ]
    return standard + sizes


class Timing:
    """Blocks of meta-steps of one workload, timed after the first step (which compiles) and a warm-up."""

    def __init__(self, workload: Workload, block_s: float):
        self._tasks = workload.tasks
        self._learner, self._batches = workload.make()
        begin = time.perf_counter()
        _run(self._learner, self._batches, 1)
        self._first = time.perf_counter() - begin
        mx.reset_peak_memory()
        begin = time.perf_counter()
        self._loss = _run(self._learner, self._batches, 2)
        one = (time.perf_counter() - begin) / 2
        self._peak = mx.get_peak_memory()
        self._block = max(1, min(200, int(block_s / one)))
        self.times: list[float] = []  # seconds a meta-step, of each block

    def block(self) -> None:
        start = time.perf_counter()
        self._loss = _run(self._learner, self._batches, self._block)
        self.times.append((time.perf_counter() - start) / self._block)

    def figures(self) -> dict[str, Any]:
        typical = statistics.median(self.times)
        return {
            "ms": {"median": typical * 1e3, "min": min(self.times) * 1e3, "max": max(self.times) * 1e3},
            "first_step_s": self._first,
            "tasks_per_s": self._tasks / typical,
            "s_per_1000": typical * 1e3,
            "peak_bytes": self._peak,
            "query_loss": self._loss if np.isfinite(self._loss) else None,
        }


def measure(workload: Workload, seconds: float) -> dict[str, Any]:
    """Time meta-steps in blocks for about `seconds`.

    Returns:
        `ms` of a meta-step (`median`, `min`, `max` over blocks), `first_step_s`, `tasks_per_s`, `s_per_1000`
        iterations, `peak_bytes` of MLX's arrays and the last `query_loss`.
    """
    return in_turns([Timing(workload, seconds / 10)], seconds)[0].figures()


def in_turns(timings: list[Timing], seconds: float) -> list[Timing]:
    """At least three blocks of each, one after another, so that what else the machine does falls on all alike."""
    begin = time.perf_counter()
    while len(timings[0].times) < 3 or time.perf_counter() - begin < seconds:
        for timing in timings:
            timing.block()
    return timings


def _run(learner: MetaLearner, batches: Batches, count: int) -> float:
    """`count` meta-steps as the training loop takes them, at most two in flight; the last query loss."""
    previous, metrics = None, {}
    for _ in range(count):
        metrics = learner.meta_update(batches(learner.iteration))
        mx.async_eval(learner.meta, metrics)
        if previous is not None:
            mx.eval(previous)
        previous = metrics
    return float(metrics["query_loss"])


def benchmark(
    *,
    device: str | None = None,
    seconds: float | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    each: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Every workload on the GPU, where there is one, and on the CPU.

    Args:
        device: measure this one alone.
        seconds: of timing, a workload; see `seconds_of`.
        quick: small and short: it shows that everything runs, and no more.
        only: names of workloads, or their `short` ones; all where empty.
        each: called with every result as it comes.

    Raises:
        ToolkitError: `only` names something else.
    """
    known = workloads(quick)
    names = {short(work.name): work.name for work in known}
    asked = [names.get(name, name) for name in only]
    if unknown := [name for name in asked if name not in names.values()]:
        raise ToolkitError(f"no workload is called {', '.join(unknown)}; there are {', '.join(names.values())}")
    chosen = [work for work in known if not asked or work.name in asked]
    seconds = seconds_of(seconds, quick)
    results: list[dict[str, Any]] = []
    with default_device_kept():
        for where in devices_of(device):
            select_device(where)
            for work in chosen:
                row = {"name": work.name, "title": work.title, "device": where, **measure(work, seconds)}
                results.append(row)
                if each is not None:
                    each(row)
        about = machine()
    return {**about, "results": results, "gpu_speedup": _speedups(results)}


def seconds_of(seconds: float | None, quick: bool) -> float:
    """Of timing, a workload: as asked for, else 3, and 0.05 where it shall be quick."""
    return seconds if seconds is not None else 0.05 if quick else 3.0


def short(name: str) -> str:
    """`h64 b4` of "hidden 64, meta-batch 4": a row has 80 characters."""
    return name.replace("hidden ", "h").replace(", meta-batch ", " b")


def devices_of(device: str | None) -> list[str]:
    """What to measure on: `device` alone, or the GPU, where there is one, and the CPU."""
    if device is not None:
        return [device]
    return ["gpu", "cpu"] if gpu_kind() else ["cpu"]


class default_device_kept:
    """Leaves MLX's default device as it was."""

    def __enter__(self) -> None:
        self._before = mx.default_device()

    def __exit__(self, *_: object) -> None:
        mx.set_default_device(self._before)


def machine() -> dict[str, Any]:
    """The versions and the machine that figures belong to; plain JSON."""
    return {"version": __version__, "mlx": version("mlx"), "machine": device_info()}


def _speedups(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Workload → how many times faster the GPU is than the CPU."""
    return dict(_ratios(results))


def _ratios(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    by = {(row["name"], row["device"]): row["ms"]["median"] for row in results}
    for (name, device), ms in by.items():
        if device == "gpu" and (name, "cpu") in by:
            yield name, by[name, "cpu"] / ms

"""How well a learner adapts to tasks that training never saw: means with intervals, speed, cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import ConfigurationError
from ..files import jsonable, write_json
from ..intervals import mean_ci95
from .build import Built, checkpoint_file, restore

if TYPE_CHECKING:
    from ..config import MetaLearningConfig, Override
    from ..learners.base import MetaLearner
    from ..tasks.distribution import TaskDistribution
    from ..tasks.episode import EpisodeStack

# Episodes drawn at a time: 50 of 5-way 84 × 84 colour images are a third of a gigabyte.
_DRAWN = 50
# Up to here every number of steps is evaluated, so that curves are smooth and speeds exact.
_EVERY_STEP = 20
_TIMED = 5


class Evaluation(NamedTuple):
    report: dict[str, Any]  # plain JSON
    per_task: dict[str, np.ndarray]  # step_{k}_loss, step_{k}_acc → (episodes,)
    steps: tuple[int, ...]  # the numbers of steps in `per_task`
    tasks: list[str] | None  # of which task each episode is; None where every one is of a fresh task


def evaluate_checkpoint(
    checkpoint: str | Path,
    config: MetaLearningConfig | None = None,
    *,
    overrides: Iterable[Override] = (),
    episodes: int | None = None,
    steps: Sequence[int] | None = None,
    output: str | Path | None = None,
) -> Evaluation:
    """Evaluate what `train` saved on its own test tasks.

    Args:
        checkpoint: a checkpoint, or a run folder: its best.
        config: in place of the checkpoint's own, to evaluate on other tasks.
        overrides: settings that beat the checkpoint's own.
        episodes: default: the configuration's.
        steps: numbers of inner steps to report; default: the configuration's. 0 and the trained number are added.
        output: of the JSON report; default: see `report_path`.

    Returns:
        the evaluation; its report is in `output` too.
    """
    path = checkpoint_file(checkpoint)
    built = restore(path, overrides, config)
    found = evaluate_built(built, episodes=episodes, steps=steps)
    found.report["checkpoint"] = str(path)
    found.report["file"] = str(output or report_path(path))
    write_json(found.report["file"], found.report)
    return found


def evaluate_built(built: Built, *, episodes: int | None = None, steps: Sequence[int] | None = None) -> Evaluation:
    """Evaluate a learner on the test tasks of its configuration."""
    section = built.config.evaluation
    found = evaluate_tasks(
        built.learner,
        built.splits.test,
        episodes=section.episodes if episodes is None else episodes,
        steps=section.steps if steps is None else steps,
        transductive=section.transductive,
    )
    found.report["families"] = list(built.config.task_distribution.task_families)
    return found


def evaluate_tasks(
    learner: MetaLearner,
    tasks: TaskDistribution,
    *,
    episodes: int = 600,
    steps: Sequence[int] = (0, 1, 3, 5, 10),
    transductive: bool = True,
) -> Evaluation:
    """Evaluate `learner` on `episodes` episodes of `tasks`.

    The report's `metrics` are means over the episodes with the half-width of their 95 % interval (`_ci95`), in which
    the episodes of one task are not independent; a value that is not finite is null. `headline` is at the trained
    number of steps. Where the update rule has rates of its own for every step, the keys beyond the trained number
    stand in `extrapolated_steps`: there the last step's rates are repeated.
    """
    if episodes < 1:
        raise ConfigurationError(f"episodes is {episodes}; expected at least 1")
    if not steps or min(steps) < 0:
        raise ConfigurationError(f"steps are {list(steps)}; expected whole numbers of at least 0, such as 0,1,5,10")
    trained = learner.num_inner_steps
    shown = tuple(sorted({0, trained, *steps}))
    measured = tuple(sorted({*shown, *range(min(shown[-1], _EVERY_STEP) + 1)}))
    started = time.perf_counter()
    parts: list[dict[str, np.ndarray]] = []
    owners: list[str] | None = None if tasks.endless else []
    for stacks, own in draw(tasks, episodes):
        parts.append(learner.evaluate_per_task(stacks, None, measured, transductive=transductive))
        if owners is not None:
            owners += own or ()
    seconds = time.perf_counter() - started
    per_task = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    short = "acc" if tasks.is_classification else "loss"
    values = per_task[f"step_{trained}_{short}"]
    mean, ci95 = mean_ci95(values, owners)
    last = trained if learner.per_step_rule else shown[-1]
    metrics: dict[str, float | None] = {}
    for k in shown:
        for kind in ("acc", "loss"):
            if f"step_{k}_{kind}" in per_task:
                name = f"step_{k}_{kind}"
                metrics[name], metrics[f"{name}_ci95"] = mean_ci95(per_task[name], owners)
    report = {
        "algorithm": learner.algorithm,
        "iteration": learner.iteration,
        "episodes": len(values),
        "tasks": len(values) if owners is None else len(set(owners)),
        "trained_steps": trained,
        "adapts_by_steps": learner.adapts_by_steps,
        "transductive": transductive,
        "steps": shown,
        "headline": {
            "metric": "accuracy" if short == "acc" else "loss",
            "steps": trained,
            "mean": mean,
            "ci95": ci95,
            "diverged_tasks": int((~np.isfinite(per_task[f"step_{trained}_loss"])).sum()),
        },
        "metrics": metrics,
        "extrapolated_steps": [name for name in metrics if learner.per_step_rule and int(name.split("_")[1]) > trained],
        "adaptation_speed": {
            "steps_to_90_percent": steps_to_share(per_task, measured, short, last),
            "of_the_gain_after": last,
        },
        "trainable_parameters": learner.num_trainable,
        "evaluation_seconds_per_task": seconds / len(values),
        **_cost(learner, tasks),
    }
    return Evaluation(jsonable(report), per_task, measured, owners)


def draw(tasks: TaskDistribution, episodes: int) -> Iterable[tuple[list[EpisodeStack], list[str] | None]]:
    """`episodes` fixed episodes, some at a time, with the ids of their tasks: the same whenever they are drawn."""
    whole, rest = divmod(episodes, _DRAWN)
    for batch in [(index, _DRAWN) for index in range(whole)] + ([(0, rest)] if rest else []):
        yield tasks.batch_at(*batch), tasks.tasks_at(*batch)


def seen(report: Mapping[str, Any]) -> str:
    """How much was measured: "600 unseen tasks", "600 episodes of 100 unseen tasks"."""
    episodes, tasks = report["episodes"], report.get("tasks", report["episodes"])
    unseen = "one unseen task" if tasks == 1 else f"{tasks:,} unseen tasks"
    return unseen if tasks == episodes else f"{episodes:,} episodes of {unseen}"


def steps_to_share(
    per_task: dict[str, np.ndarray], steps: Sequence[int], kind: str, last: int, share: float = 0.9
) -> int | None:
    """The fewest steps with `share` of the gain that `last` steps bring; None where they bring none."""
    start, end = (float(per_task[f"step_{k}_{kind}"].mean()) for k in (0, last))
    gain = end - start if kind == "acc" else start - end
    if not np.isfinite(gain) or gain <= 0:
        return None
    for k in steps:
        now = float(per_task[f"step_{k}_{kind}"].mean())
        if (now - start if kind == "acc" else start - now) >= share * gain:
            return k
    return None


def report_path(checkpoint: Path) -> Path:
    """`evaluation.json` in the checkpoint's run folder, of one that is not its best with its name in it; beside a
    checkpoint that is in none, under its own name."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (run / "config.json").is_file():
        return run / ("evaluation.json" if checkpoint.stem == "best" else f"evaluation_{checkpoint.stem}.json")
    return checkpoint.with_suffix(".evaluation.json")


def _cost(learner: MetaLearner, tasks: TaskDistribution) -> dict[str, float]:
    """Of one call of `adapt` on one task and a prediction of its query: median seconds, peak bytes of memory."""
    episode = tasks.batch_at(0, 1)[0]
    sx, sy, qx = (part[0] for part in episode[:3])
    mx.eval(sx, sy, qx)
    seconds, memory = [], 0
    for _ in range(_TIMED + 1):
        mx.synchronize()  # a GPU frees what an evaluation held some time after it
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        mx.eval(learner.adapt(sx, sy)(qx))
        seconds.append(time.perf_counter() - started)
        memory = max(memory, mx.get_peak_memory() - before)
    return {"seconds_per_task": statistics.median(seconds[1:]), "peak_memory_bytes_per_task": memory}

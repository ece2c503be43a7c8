"""Meta-learned against what one would use instead, at several numbers of examples, on the same tasks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ConfigurationError, ModelError, TaskSamplingError
from ..files import jsonable, write_json
from ..intervals import difference, interval, mean_ci95
from ..learners.base import Episodes, MetaLearner
from ..nn.losses import LossFn
from ..runs.build import Built
from ..runs.evaluate import draw
from ..tasks.distribution import TaskDistribution
from ..tasks.episode import Episode, EpisodeStack, as_stacks, stack_episodes
from .baseline import choose_rate, fine_tuner, joint_pretraining, untrained_model

Results = dict[int, dict[str, float | None]]
# Offered to each baseline, in multiples of the learner's own inner rate; validation tasks choose.
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
# Of fine-tuning, where nothing says how many and the learner has none.
_STEPS = 5


class BaselineComparison:
    """Compares a meta-learned model with a standard one, both adapted to K examples of each episode.

    A model is a `MetaLearner`, which adapts by its own rule, or any `nn.Module`, which is fine-tuned with SGD by
    the toolkit's own inner loop. Both adapt on the same K examples and are measured on the same others.

    Args:
        loss_fn: default by the targets.
        num_steps: of adaptation; default: as the meta-learner was trained, else 5.
        lr: of the SGD of an `nn.Module`; default: the meta-learner's inner rate, else 0.01.
        per_class: whether K counts the examples of each class, or all together. Default: of each class where
            every support holds its classes equally often (way and shot), else all together.

    Example:
        >>> comparison = BaselineComparison()
        >>> results = comparison.compare_few_shot_performance(learner, SimpleClassifier(), episodes, [1, 5, 10])
        >>> results[5]["meta_acc"], results[5]["baseline_acc"]
    """

    def __init__(
        self,
        loss_fn: LossFn | None = None,
        *,
        num_steps: int | None = None,
        lr: float | None = None,
        per_class: bool | None = None,
    ):
        self.loss_fn, self.num_steps, self.lr, self.per_class = loss_fn, num_steps, lr, per_class

    def compare_few_shot_performance(
        self,
        meta_learned_model: MetaLearner | nn.Module,
        standard_model: MetaLearner | nn.Module,
        episodes: Episodes,
        k_shots: Sequence[int] = (1, 5, 10),
    ) -> Results:
        """Both models at each K of `k_shots`.

        Where the support holds fewer than K examples, the others are borrowed from the query, and no model is
        measured on anything that any K borrows: every K is measured on the same examples.

        Returns:
            K → `meta_acc`, `meta_loss`, `baseline_acc`, `baseline_loss`, each with its `_ci95` (half-width of the
            95 % interval over the episodes). Regression has the losses only.
        """
        learner = next((m for m in (meta_learned_model, standard_model) if isinstance(m, MetaLearner)), None)
        cut = with_shots(episodes, k_shots, per_class=self.per_class)
        return {
            k: {
                **self._measure("meta", meta_learned_model, stacks, learner),
                **self._measure("baseline", standard_model, stacks, learner),
            }
            for k, stacks in cut.items()
        }

    def evaluate_standard_finetuning(
        self, model: nn.Module, episodes: Episodes, num_steps: int | None = None, lr: float | None = None
    ) -> dict[str, float | None]:
        """Fine-tune copies of `model` on the support of each episode, measure on its query.

        Returns:
            `acc` (classification) and `loss` after fine-tuning, `acc_before` and `loss_before` without it, each
            with its `_ci95`.
        """
        steps = num_steps if num_steps is not None else self.num_steps if self.num_steps is not None else _STEPS
        tuner = self._adapter(model, lr or self.lr or 0.01, steps)
        values = tuner.evaluate_per_task(episodes, self.loss_fn, (0, steps))
        report = {}
        for suffix, k in (("", steps), ("_before", 0)):
            for kind in ("acc", "loss"):
                if f"step_{k}_{kind}" in values:
                    name = f"{kind}{suffix}"
                    report[name], report[f"{name}_ci95"] = mean_ci95(values[f"step_{k}_{kind}"])
        return report

    def _measure(self, who: str, model: Any, stacks: list[EpisodeStack], learner: MetaLearner | None) -> dict:
        lr = self.lr or (learner.inner_lr if learner else 0.01)
        default = learner.num_inner_steps if learner else _STEPS
        steps = self.num_steps if self.num_steps is not None else default
        if isinstance(model, MetaLearner) and self.num_steps is None:
            steps = model.num_inner_steps
        values = self._adapter(model, lr, steps).evaluate_per_task(stacks, self.loss_fn, (steps,))
        report = {}
        for kind in ("acc", "loss"):
            if f"step_{steps}_{kind}" in values:
                report[f"{who}_{kind}"], report[f"{who}_ci95" if kind == "acc" else f"{who}_loss_ci95"] = mean_ci95(
                    values[f"step_{steps}_{kind}"]
                )
        return report

    @staticmethod
    def _adapter(model: MetaLearner | nn.Module, lr: float, steps: int) -> MetaLearner:
        if isinstance(model, MetaLearner):
            return model
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a MetaLearner or an mlx.nn.Module, got {type(model).__name__}")
        return fine_tuner(model, lr, steps)


def with_shots(
    episodes: Episodes, k_shots: Sequence[int], *, per_class: bool | None = None
) -> dict[int, list[EpisodeStack]]:
    """Each episode with a support of K examples, for each K; the query is what no K uses, the same for all.

    Examples are taken from the support in their order, class by class in turn, then from the query. The episodes keep
    their order: what else is known of each (of which task it is) goes with them.

    Raises:
        TaskSamplingError: an episode has too few examples.
    """
    shots = sorted(set(k_shots))
    if not shots or shots[0] < 1 or any(int(k) != k for k in shots):
        raise ConfigurationError(f"k_shots are {list(k_shots)}; expected whole numbers of at least 1, such as 1, 5, 10")
    stacks = as_stacks(episodes)
    arrays = [tuple(np.array(part) for part in stack) for stack in stacks]
    if per_class is None:
        per_class = all(_balanced(labels) for _, sy, _, _ in arrays for labels in sy)
    cut: dict[int, list[Episode]] = {k: [] for k in shots}
    number = 0
    for sx, sy, qx, qy in arrays:
        size = sy.shape[1]
        for x, y in zip(np.concatenate([sx, qx], 1), np.concatenate([sy, qy], 1), strict=True):
            order = _in_turn(y, size, shots[-1] if per_class else None)
            ways = len(np.unique(y[:size])) if per_class else 1
            most = shots[-1] * ways
            # The support's own rows are never measured on, used or not.
            rest = np.setdiff1d(np.arange(size, len(y)), order[:most])
            if len(order) < most or not len(rest):
                each = " of each class" if per_class else ""
                raise TaskSamplingError(
                    f"episode {number} has {size} support and {len(y) - size} query examples: too few to adapt on "
                    f"K = {shots[-1]}{each} and measure on others; draw episodes with a larger query_size"
                )
            for k in shots:
                picked = order[: k * ways]
                cut[k].append(Episode(*(mx.array(a) for a in (x[picked], y[picked], x[rest], y[rest]))))
            number += 1
    return {k: _in_order(parts) for k, parts in cut.items()}


def _in_order(episodes: list[Episode]) -> list[EpisodeStack]:
    """Neighbours of equal shape stacked; `stack_episodes` alone would bring together what lies apart."""
    runs = itertools.groupby(episodes, key=lambda episode: tuple((part.shape, part.dtype) for part in episode))
    return [stack for _, run in runs for stack in stack_episodes(list(run))]


def _in_turn(y: np.ndarray, size: int, most: int | None) -> np.ndarray:
    """Rows in the order in which they are used: the classes of the support in turn, its own rows before borrowed ones.

    With `most`, rounds are complete and there are at most so many: row r · ways + c is class c's r-th example.
    """
    if not np.issubdtype(y.dtype, np.integer):
        return np.arange(len(y))
    classes = list(dict.fromkeys(y[:size].tolist()))
    queues = [np.nonzero(y == c)[0] for c in classes]
    if most is not None:
        rounds = min(most, *map(len, queues))
        return np.stack([queue[:rounds] for queue in queues], 1).ravel()
    own = _alternate([queue[queue < size] for queue in queues])
    borrowed = _alternate([np.nonzero((y == c) & (np.arange(len(y)) >= size))[0] for c in np.unique(y)])
    return np.concatenate([own, borrowed])


def _alternate(queues: list[np.ndarray]) -> np.ndarray:
    longest = max((len(queue) for queue in queues), default=0)
    return np.array([queue[i] for i in range(longest) for queue in queues if i < len(queue)], int)


def _balanced(labels: np.ndarray) -> bool:
    if not np.issubdtype(labels.dtype, np.integer):
        return False
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and bool((counts == counts[0]).all())


# --- the command's recipe --------------------------------------------------------------------------------------------


def compare_run(
    built: Built,
    *,
    k_shots: Sequence[int] = (1, 5, 10),
    episodes: int = 200,
    iterations: int | None = None,
    folder: Path | None = None,
    each: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """A trained learner against fine-tuning from random weights and from joint pre-training, at each K.

    All adapt on the same K examples of the run's test tasks with as many steps, and are measured on the same
    queries. Each baseline has the best of five rates, chosen on validation tasks; joint pre-training sees as
    many meta-batches as meta-training did.

    Args:
        built: a trained learner with its configuration and splits.
        k_shots: numbers of examples: of each class for families of way and shot, all together for the others.
        episodes: test episodes.
        iterations: of joint pre-training; default: the learner's.
        folder: where to write `comparison.json` and `plots/comparison.png`.
        each: called with (done, of) as joint pre-training goes.

    Returns:
        the report: `results` by method and K; `differences`, meta-learned minus each baseline on the same episodes,
        whose intervals are narrower than those of two means; `inner_steps`, which fine-tuning takes, and the learner
        where it `adapts_by_steps`; `rates`, `title`.
    """
    learner, config = built.learner, built.config
    shots = sorted(set(k_shots))
    if not shots or shots[0] < 1:
        raise ConfigurationError(f"K is {list(k_shots)}; expected whole numbers of at least 1, such as 1,5,10")
    test, val = built.splits.test, built.splits.val
    per_class = all(test.families[c.task_family].way_and_shot for c in test.configs)
    trained = learner.num_inner_steps
    steps = trained or _STEPS
    total = learner.iteration if iterations is None else iterations

    try:  # too few examples are told before the training of a baseline
        test, val = (with_support(tasks, shots[-1]) for tasks in (test, val))
        validation = with_shots(val.batch_at(0, min(len(val), 100)), shots, per_class=per_class)
        drawn = list(draw(test, episodes))
    except TaskSamplingError as error:
        of = " of each class" if per_class else ""
        raise TaskSamplingError(
            f"--shots {','.join(map(str, shots))} adapts to {shots[-1]} examples{of}: {error}; give smaller numbers"
        ) from error
    stacks = [stack for part, _ in drawn for stack in part]
    owners = None if test.endless else [task for _, own in drawn for task in own or ()]
    cut = with_shots(stacks, shots, per_class=per_class)
    if learner.has_slots:
        _check_classes(learner, cut)

    start = untrained_model(built)
    joint = joint_pretraining(
        start,
        built.splits.train,
        total,
        meta_batch_size=config.meta_batch_size,
        lr=config.outer_lr,
        seed=config.seed,
        each=None if each is None else lambda done: each(done, total),
    )
    rates = [factor * learner.inner_lr for factor in RATES]
    baselines = {"random initialisation": start, "joint pre-training": joint}
    chosen = {
        name: {k: choose_rate(model, validation[k], rates, steps) for k in shots} for name, model in baselines.items()
    }

    results: dict[str, Results] = {"meta-learned": {}, **{name: {} for name in baselines}}
    differences: dict[str, Results] = {name: {} for name in baselines}
    for k, episodes_of_k in cut.items():
        values = {"meta-learned": (learner.evaluate_per_task(episodes_of_k, None, (trained,)), trained)}
        for name, model in baselines.items():
            tuner = fine_tuner(model, chosen[name][k], steps)
            values[name] = (tuner.evaluate_per_task(episodes_of_k, None, (steps,)), steps)
        own, own_after = values["meta-learned"]
        for name, (found, after) in values.items():
            row = results[name].setdefault(k, {})
            for kind in ("acc", "loss"):
                if f"step_{after}_{kind}" in found:
                    theirs = found[f"step_{after}_{kind}"]
                    row[kind], row[f"{kind}_ci95"] = mean_ci95(theirs, owners)
                    if name in differences:
                        with np.errstate(invalid="ignore"):  # infinity less infinity
                            ahead = own[f"step_{own_after}_{kind}"] - theirs
                        apart = differences[name].setdefault(k, {})
                        apart[kind], apart[f"{kind}_ci95"] = mean_ci95(ahead, owners)
    metric = "accuracy" if test.is_classification else "loss"
    report = jsonable(
        {
            "algorithm": learner.algorithm,
            "metric": metric,
            "inner_steps": steps,
            "adapts_by_steps": learner.adapts_by_steps,
            "k_shots": shots,
            "k_counts": "examples of each class" if per_class else "all examples",
            "episodes": episodes,
            "tasks": episodes if owners is None else len(set(owners)),
            "joint_iterations": total,
            "rates": {"meta-learned": learner.inner_lr if learner.adapts_by_steps else None, **chosen},
            "results": results,
            "differences": differences,
        }
    )
    usual = config.task_distribution.k_shot
    report["title"] = _title(report, str(min(shots, key=lambda k: abs(k - usual))))
    if folder is not None:
        draw_comparison(report, folder / "plots" / "comparison.png")
        write_json(folder / "comparison.json", report)
    return report


def _check_classes(learner: MetaLearner, cut: Mapping[int, list[EpisodeStack]]) -> None:
    """A learner without a head tells apart the classes of a support, and no others."""
    whole = {k: all(_has_all(stack) for stack in stacks) for k, stacks in cut.items()}
    if all(whole.values()):
        return
    fitting = [str(k) for k, fits in whole.items() if fits]
    raise TaskSamplingError(
        f"--shots {','.join(map(str, cut))}: {learner.algorithm} answers with the classes of its examples alone, and "
        f"those of K = {', '.join(str(k) for k, fits in whole.items() if not fits)} lack a class that is asked for; "
        + (f"give --shots {','.join(fitting)}" if fitting else "give larger numbers")
    )


def _has_all(stack: EpisodeStack) -> bool:
    """Whether every class of each query is in its support."""
    support, asked = np.array(stack.support_y), np.array(stack.query_y)
    return bool((asked[:, :, None] == support[:, None, :]).any(2).all())


def with_support(tasks: TaskDistribution, most: int) -> TaskDistribution:
    """The same tasks with a support of at least `most` examples (of each class, where families speak of shots)."""

    def enlarged(config):
        if tasks.families[config.task_family].way_and_shot:
            shot = max(most, int(config.task_params.get("k_shot", 1)))
            return dataclasses.replace(config, task_params={**config.task_params, "k_shot": shot})
        return dataclasses.replace(config, support_size=max(most, config.support_size))

    return type(tasks)(
        [enlarged(config) for config in tasks.configs],
        tasks.seed,
        endless=tasks.endless,
        families=tasks.families,
        stream=tasks.stream,
    )


def draw_comparison(report: dict[str, Any], path: Path) -> Path:
    """The plot of a report of `compare_run`."""
    from ..runs.plots import Curve, comparison, save

    kind = "acc" if report["metric"] == "accuracy" else "loss"
    curves = {}
    for name, rows in report["results"].items():
        points = [(int(k), row[kind], row[f"{kind}_ci95"]) for k, row in rows.items() if row[kind] is not None]
        if points:
            curves[name] = Curve(*np.array(points, float).T.tolist())
    return save(comparison(curves, report["metric"], report["title"], of=report["k_counts"]), path)


def _title(report: dict[str, Any], k: str) -> str:
    """What is to be seen at `k`, of the numbers the one nearest to training's, against the best baseline there."""
    kind, best = ("acc", max) if report["metric"] == "accuracy" else ("loss", min)
    rows = {name: rows[k][kind] for name, rows in report["results"].items()}
    meta = rows.pop("meta-learned")
    others = {name: value for name, value in rows.items() if value is not None}
    if meta is None or not others:
        return f"{report['metric'].capitalize()} after adaptation"
    rival = best(others, key=others.__getitem__)
    share = kind == "acc"
    ours, theirs = (interval(value, None, percent=share) for value in (meta, others[rival]))
    text = f"K = {k}: {report['metric']} {ours} meta-learned, {theirs} after {rival}"
    mean, width = (report["differences"][rival][k][name] for name in (kind, f"{kind}_ci95"))
    if mean is None:  # a task diverged
        return text
    apart = difference(mean, width, percent=share)
    told = width is None or abs(mean) > width  # of one task nothing is known but the difference
    return f"{text}; " + (f"the difference is {apart}" if told else f"not told apart ({apart})")

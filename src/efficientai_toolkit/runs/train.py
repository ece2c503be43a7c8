"""The only stateful loop: meta-train, validate, log, checkpoint, and go on after a stop as if there had been none.

A run is a pure function of its configuration: batch `i` is drawn from (seed, i), and what a checkpoint holds is
everything else. So a run that is killed at any moment and resumed ends bit for bit where it would have ended; on
a GPU, where an embedding is trained, to rounding, since its gradient is added up in no fixed order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from logging import DEBUG, INFO, Logger
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..adapters.fixed import fixed_arrays
from ..checkpoint import read_header, read_npz, write_npz
from ..config import MetaLearningConfig, Override
from ..errors import CheckpointError, ConfigurationError, DivergenceError, OutputError
from ..intervals import mean_ci95
from ..logging import setup_logger
from .base_model import describe_base, load_checkpoint
from .build import Built, build
from .experiment import ExperimentManager, open_run
from .interrupt import interruptible
from .trackers import open_trackers

# Steps that may be queued on the device while Python prepares the next.
_IN_FLIGHT = 2


class Watch:
    """What looks on at a run; every method may be left as it is."""

    def begin(self, run: Path, first: int, total: int, tasks: int) -> None:
        """Iterations `first` … `total` of `tasks` tasks each are about to run, in the folder `run`."""

    def step(self, iteration: int, latest: Callable[[], dict[str, float]]) -> None:
        """`iteration` is queued; `latest()` waits for the newest metrics that are (nearly) there."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row was logged."""

    def say(self, text: str) -> None:
        """Something worth a line happened."""

    def end(self) -> None:
        """The loop is over."""


@dataclasses.dataclass
class Progress:
    """What the loop remembers beside the learner; saved in every checkpoint's header."""

    best: dict[str, Any] | None = None  # the best validation row
    stale: int = 0  # validations since then
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # metrics since the last row
    seconds: float = 0.0


def train(config: MetaLearningConfig, *, name: str | None = None, watch: Watch | None = None) -> dict[str, Any]:
    """Meta-train as `config` says, in a new run folder.

    Args:
        config: the whole configuration.
        name: first part of the run folder's name; default from algorithm and family.
        watch: progress.

    Returns:
        the report: `run`, `iterations`, `stopped` ("completed", "interrupted", "patience", "target_accuracy"),
        `best` (the best validation), `checkpoints`, `seconds`.

    Raises:
        DivergenceError: a loss or gradient became NaN or infinite; the last good state is `last.npz`.
        ToolkitError: whatever else the configuration got wrong, before anything is written.
    """
    built = build(config)
    _writable(Path(config.paths.checkpoint_dir))  # before there is a run folder
    run = ExperimentManager(config.paths.output_dir, name, config.to_dict())
    with run.alone():
        return _Loop(built, run, Progress(), watch or Watch()).run()


def resume(run: str | Path, overrides: Iterable[Override] = (), *, watch: Watch | None = None) -> dict[str, Any]:
    """Go on with the run in the folder `run` from its newest whole checkpoint; see `train`.

    Without a checkpoint it begins again. Rows of `metrics.jsonl` later than the checkpoint are dropped.

    Raises:
        ConfigurationError: another process is at work in the folder, or another command made it.
    """
    with open_run(run, "train").alone() as manager:
        return _resume(manager, overrides, watch or Watch())


def _resume(manager: ExperimentManager, overrides: Iterable[Override], watch: Watch) -> dict[str, Any]:
    path = manager.path
    for unfinished in (path / "checkpoints").glob(".*.npz.*"):  # a kill came in the middle of a write
        unfinished.unlink(missing_ok=True)
    where = str(path / "config.json")
    config = MetaLearningConfig.from_dict(manager.config, overrides, where=where)
    if config.seed != MetaLearningConfig.from_dict(manager.config, where=where).seed:
        raise ConfigurationError(f"{path} goes on with its own seed; leave meta_learning.seed out")
    built = build(config)
    newest = newest_checkpoint(path, watch.say)
    progress, iteration = Progress(), 0
    if newest is not None:
        load_checkpoint(built.learner, config, newest)
        iteration = built.learner.iteration
        saved = read_header(newest).get("training", {})
        try:
            progress = Progress(**saved) if iteration else progress  # a start is not the best of what follows
        except TypeError as error:
            raise CheckpointError(f"{newest} does not say how far its run was; resume needs one of `train`") from error
        if iteration > config.num_meta_iterations:
            raise ConfigurationError(
                f"{path} has done {iteration} iterations already, and {config.num_meta_iterations} are asked for; "
                "a run can go on, and not back"
            )
    manager = ExperimentManager.open(path, iteration or -1)  # what begins again logs its start again
    return _Loop(built, manager, progress, watch).run()


def newest_checkpoint(run: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The checkpoint of the most iterations in the run folder; a damaged one is passed over, and said so."""
    found: list[tuple[int, bool, Path]] = []
    for path in sorted((run / "checkpoints").glob("*.npz")):
        try:
            read_npz(path)  # all of it: a header may outlive its arrays
            header = read_header(path)
            found.append((int(header["learner"]["iteration"]), path.stem == "last", path))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            say(f"passed over: {error}")
    return max(found)[2] if found else None


class _Loop:
    def __init__(self, built: Built, run: ExperimentManager, progress: Progress, watch: Watch):
        self.config, self.learner, self.splits = built
        self.meta = self.config.meta_learning
        self.run_folder, self.progress, self.watch = run, progress, watch
        self.base, self.fixed = describe_base(self.config, self.learner.model), fixed_arrays(self.learner.model)
        self.good: tuple[int, dict, dict] | None = None  # the newest state that is known to be finite
        self.latest = _writable(Path(self.config.paths.checkpoint_dir)) / "best.npz"
        log = self.config.logging
        self.log_file: Logger | None = None
        if log.log_dir is not None:
            self.log_file = setup_logger("efficientai_toolkit", log.log_dir, log.log_level, console=False)
        self.trackers = open_trackers(self.config.logging, run, self.learner.iteration)
        self.validation = self.splits.val.batch_at(0, len(self.splits.val))

    def run(self) -> dict[str, Any]:
        learner, meta, watch = self.learner, self.meta, self.watch
        first, total, tasks = learner.iteration, meta.num_meta_iterations, meta.meta_batch_size
        log_interval = self.config.logging.log_interval
        pending = self.progress.pending
        self.started, self.since, self.logged = time.perf_counter(), time.perf_counter(), first
        if first:
            self._repeat_saves()
        self._keep()
        watch.begin(self.run_folder.path, first, total, tasks)
        try:
            with interruptible() as interrupted:
                stopped = self._stop()
                if stopped is None and first == 0:
                    self._validate()  # what training brings is seen against this row
                    if total == 0:
                        self._save(final=True)
                while stopped is None and learner.iteration < total:
                    batch, coming = self.splits.train.batch_at(learner.iteration, tasks), learner.iteration + 1
                    metrics = learner.meta_update(batch, support_loss=coming % log_interval == 0 or coming == total)
                    mx.async_eval(metrics, learner.meta)
                    pending.append(metrics)
                    if len(pending) > _IN_FLIGHT:
                        mx.eval(pending[-1 - _IN_FLIGHT])
                    now = learner.iteration
                    watch.step(now, self._latest)
                    if now % log_interval == 0 or now == total:
                        self._log_pending()
                    validate = now % meta.eval_interval == 0 or now == total
                    if validate:
                        self._validate()
                    stopped = (self._stop() if validate else None) or ("interrupted" if interrupted.is_set() else None)
                    if validate or stopped or now % meta.save_interval == 0:
                        self._save(final=now == total or stopped is not None)
        finally:
            watch.end()
            for tracker in self.trackers:
                tracker.close()
        return self._report(stopped if learner.iteration < total else None)

    def _stop(self) -> str | None:
        """Why to stop early, from what is saved, so that a resumed run decides alike."""
        best = self.progress.best
        if best is None:
            return None
        target = self.meta.target_accuracy
        if target is not None and (best.get("val_accuracy") or 0.0) >= target:
            return "target_accuracy"
        if self.meta.patience is not None and self.progress.stale >= self.meta.patience:
            return "patience"
        return None

    # --- metrics -------------------------------------------------------------------------------------------------

    def _latest(self) -> dict[str, float]:
        pending = self.progress.pending
        return _floats(pending[max(0, len(pending) - 1 - _IN_FLIGHT)]) if pending else {}

    def _settle(self) -> None:
        """Turn what is pending into numbers and see that they are finite; the state after them is then good."""
        pending, now = self.progress.pending, self.learner.iteration
        for index, metrics in enumerate(pending):
            values = pending[index] = _floats(metrics)
            if not all(map(math.isfinite, values.values())):
                bad = next(name for name, value in values.items() if not math.isfinite(value))
                self._diverged(bad, values[bad], now - len(pending) + index + 1)
        self._keep()

    def _log_pending(self) -> None:
        self._settle()
        pending, now = self.progress.pending, self.learner.iteration
        clock = time.perf_counter()
        tasks = (now - self.logged) * self.meta.meta_batch_size
        self._log(
            {
                "iteration": now,
                **_means(pending),
                "seconds": round(self._seconds(), 4),
                "tasks_per_second": round(tasks / max(clock - self.since, 1e-9), 1),
            }
        )
        self.since, self.logged = clock, now
        pending.clear()
        self._keep()

    def _validate(self) -> None:
        """Query loss and accuracy on the held-out tasks, before and after the trained number of steps."""
        self._settle()
        before, after = 0, self.learner.num_inner_steps
        transductive = self.config.evaluation.transductive
        values = self.learner.evaluate_per_task(
            self.validation, num_adaptation_steps=(before, after), transductive=transductive
        )
        row: dict[str, Any] = {"iteration": self.learner.iteration}
        for short, name in (("loss", "val_loss"), ("acc", "val_accuracy")):
            if f"step_{after}_{short}" in values:
                row |= _mean_ci(name, values[f"step_{after}_{short}"])
                row[f"{name}_before"] = _finite(values[f"step_{before}_{short}"].mean())
        # The start is never the best, but where there is nothing else: with patience or a target, a run would not go.
        if self.learner.iteration or not self.meta.num_meta_iterations:
            if _score(row) > _score(self.progress.best):
                self.progress.best, self.progress.stale = row, 0
            else:
                self.progress.stale += 1
        self._log(row)
        self.since = time.perf_counter()  # validation is not training time

    def _log(self, row: dict[str, Any]) -> None:
        self.run_folder.log(row)
        for tracker in self.trackers:
            tracker.log(row)
        self.watch.row(row)
        if self.log_file:
            self.log_file.log(INFO if "val_loss" in row else DEBUG, "%s: %s", self.run_folder.path.name, row)

    def _seconds(self) -> float:
        return self.progress.seconds + time.perf_counter() - self.started

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        # Arrays are immutable: to keep a state is to keep references.
        self.good = (self.learner.iteration, self._arrays(), self._header())

    def _arrays(self) -> dict[str, mx.array]:
        return {**self.learner.state(), **self.fixed}

    def _header(self) -> dict[str, Any]:
        progress = dataclasses.asdict(dataclasses.replace(self.progress, pending=[], seconds=self._seconds()))
        progress["pending"] = [dict(metrics) for metrics in self.progress.pending]
        return {
            "learner": self.learner.describe(),
            "base": self.base,
            "config": self.config.to_dict(),
            "training": progress,
        }

    def _save(self, *, final: bool) -> None:
        self._settle()
        now = self.learner.iteration
        arrays, header = self._arrays(), self._header()
        if now and now % self.meta.save_interval == 0:
            write_npz(self.run_folder.checkpoint_path(f"iter_{now}"), arrays, header)
        if final or now % self.meta.save_interval == 0:
            write_npz(self.run_folder.checkpoint_path("last"), arrays, header)
        if self.progress.best and self.progress.best["iteration"] == now:
            write_npz(self.run_folder.checkpoint_path("best"), arrays, header)
            self._save_latest(arrays, header)

    def _save_latest(self, arrays: dict[str, mx.array], header: dict[str, Any]) -> None:
        if not _same_learner(self.latest, header):  # then what was measured of the one before is not of this
            for told in self.latest.parent.glob(f"{self.latest.stem}.evaluation*.json"):
                told.unlink(missing_ok=True)
        write_npz(self.latest, arrays, header)

    def _repeat_saves(self) -> None:
        """A kill may have come between two files of one iteration; and another run may have had the last word."""
        best = self.run_folder.checkpoint_path("best")
        if self.progress.best and self.progress.best["iteration"] != self.learner.iteration and best.is_file():
            self._save_latest(*_rewritable(best))
        self._save(final=False)

    def _diverged(self, name: str, value: float, iteration: int) -> None:
        kept = "nothing was saved yet"
        if self.good is not None:
            path = self.run_folder.checkpoint_path("last")
            write_npz(path, self.good[1], self.good[2])
            kept = f"the last good state (iteration {self.good[0]}) is {path}"
        said = (
            f"{name} became {'NaN' if math.isnan(value) else 'infinite'} at iteration {iteration}; {kept}. "
            "Lower meta_learning.inner_lr or outer_lr, or set meta_learning.gradient_clip"
        )
        if self.log_file:
            self.log_file.error("%s: %s", self.run_folder.path.name, said)
        raise DivergenceError(said)

    def _report(self, stopped: str | None) -> dict[str, Any]:
        run = self.run_folder
        paths = {name: run.checkpoint_path(name) for name in ("best", "last")}
        report = {
            "run": str(run.path),
            "algorithm": self.config.algorithm,
            "stopped": stopped or "completed",
            "iterations": self.learner.iteration,
            "of": self.meta.num_meta_iterations,
            "best": self.progress.best,
            "trainable_parameters": self.learner.num_trainable,
            "checkpoints": {name: str(path) for name, path in paths.items() if path.is_file()},
            "latest_best": str(self.latest),
            "seconds": round(self._seconds(), 3),
        }
        run.finish(report)
        if self.log_file:
            self.log_file.info("%s: %s after %d iterations", run.path.name, report["stopped"], report["iterations"])
        return report


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror or error}; set paths.checkpoint_dir") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write in {folder}; set paths.checkpoint_dir to a folder that can be written")
    return folder


def _same_learner(path: Path, header: dict[str, Any]) -> bool:
    """Whether the checkpoint at `path` is of the same settings and iteration, which make it what it is."""
    try:
        found = read_header(path)
    except CheckpointError:
        return False
    wanted = json.loads(json.dumps(header))
    return (found.get("config"), found.get("learner", {}).get("iteration")) == (
        wanted["config"],
        wanted["learner"]["iteration"],
    )


def _rewritable(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    arrays, header = read_npz(path)
    return arrays, {name: header[name] for name in header if name not in ("format", "format_version")}


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        means[name] = sum(values) / len(values)
    return means


def _mean_ci(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Mean over tasks and the half-width of its 95 % interval, which one task alone does not have."""
    mean, width = mean_ci95(values)
    return {name: _finite(mean), f"{name}_ci95": None if width is None else _finite(width)}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _score(row: Mapping[str, Any] | None) -> tuple[float, float]:
    """Higher is better: accuracy where there is one, then the loss."""
    if row is None:
        return -math.inf, -math.inf
    accuracy, loss = row.get("val_accuracy"), row.get("val_loss")
    return (0.0 if accuracy is None else accuracy, -math.inf if loss is None else -loss)

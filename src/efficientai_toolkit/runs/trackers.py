"""Where a run's metrics go besides its folder: TensorBoard, Weights & Biases. Each is imported when it is used."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigurationError
from ..files import jsonable, writing

if TYPE_CHECKING:
    from ..config import LoggingSection
    from .experiment import ExperimentManager

# TensorBoard's writer takes a third of a second to import: a run shorter than this pays it once, at its end.
_PATIENCE = 3.0


class Tracker(Protocol):
    def log(self, row: Mapping[str, Any]) -> None:
        """Take one row of metrics, with its `iteration`."""

    def close(self) -> None:
        """Hand over what is still held."""


def open_trackers(logging: LoggingSection, run: ExperimentManager, iteration: int = 0) -> list[Tracker]:
    """The trackers that the configuration's section `logging` enables, for a run that goes on after `iteration`.

    Raises:
        ConfigurationError: one is enabled that is not installed.
    """
    trackers: list[Tracker] = []
    if logging.tensorboard_enabled:
        trackers.append(TensorBoard(run, iteration))
    if logging.wandb_enabled:
        trackers.append(WandB(run))
    return trackers


class TensorBoard:
    """Event files in the run's `tensorboard/`; after a resume, steps later than `iteration` are purged."""

    def __init__(self, run: ExperimentManager, iteration: int = 0):
        self._folder, self._iteration = run.tensorboard, iteration
        self._writer: Any = None
        self._held: list[tuple[float, dict[str, float], int]] = []
        self._opened = time.monotonic()

    def log(self, row: Mapping[str, Any]) -> None:
        self._held.append((time.time(), scalars(row), int(row.get("iteration", 0))))
        if time.monotonic() - self._opened > _PATIENCE:
            self._write()

    def close(self) -> None:
        if self._held:
            self._write()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        with writing(self._folder):
            if self._writer is None:
                from tensorboardX import SummaryWriter

                purge = self._iteration + 1 if self._iteration else None
                self._writer = SummaryWriter(logdir=str(self._folder), purge_step=purge)
            for walltime, values, iteration in self._held:
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, iteration, walltime=walltime)
            self._held.clear()
            self._writer.flush()


class WandB:
    """A Weights & Biases run whose id is the run folder's name, so that a resumed run goes on in place."""

    def __init__(self, run: ExperimentManager, project: str = "efficientai-toolkit"):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                "logging.wandb_enabled is true, but wandb is not installed; install the extra "
                "`efficientai-toolkit[wandb]`, or set logging.wandb_enabled to false"
            ) from error
        name = run.path.name
        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(run.path), config=jsonable(run.config)
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(scalars(row), step=int(row.get("iteration", 0)))

    def close(self) -> None:
        self._run.finish()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under `train/…` and `val/…`; what is not finite is left out."""
    plain: dict[str, Any] = jsonable(row)
    return {
        f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}": float(value)
        for name, value in plain.items()
        if name != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }

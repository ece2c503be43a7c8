"""The folder of one run: what was asked for, on what machine, every metric as it came, and what came out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError, ConfigurationError, DataError
from ..files import jsonable, read_json, write_json, write_text, writing

# Command → what `config.json` of its runs holds, and that of no other's.
_COMMANDS = {"train": "meta_learning", "continual": "strategies", "melpa": "n_meta_epochs"}


class ExperimentManager:
    """A run folder `output/NAME_TIMESTAMP/`.

    | file | holds |
    |---|---|
    | `config.json` | the whole configuration |
    | `system.json` | machine, versions, seed, git commit |
    | `metrics.jsonl` | one row a `log`, written as it comes |
    | `metrics.json` | the same by column, and the last row (`finish`) |
    | `full_report.json` | configuration, system, last row and results (`finish`) |
    | `checkpoints/`, `plots/`, `tensorboard/` | |

    A crash loses nothing that was logged: a row is in the file when `log` returns. A loop that checkpoints
    logs a row *before* it writes the checkpoint of that iteration, so that `open(path, iteration)` can give
    back exactly the rows that the checkpoint has seen.

    Args:
        output: parent of run folders.
        name: first part of the folder's name, no path; default from the configuration, such as `MAML_Sinusoid`.
        config: the configuration as plain values.

    Raises:
        ConfigurationError: the name is a path.
        OutputError: where the folder cannot be made or written.
    """

    def __init__(
        self,
        output: Path | str = "experiments",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.config: dict[str, Any] = jsonable(config or {})
        self.name = name or default_name(self.config)
        if set(self.name) & set("/\\\0"):
            raise ConfigurationError(
                f"a run's name is {self.name!r}; expected one without / or \\ (--output is its folder)"
            )
        self._set_paths(_fresh_folder(Path(output), self.name))
        self.system = system_info(seed=seed_of(self.config))
        write_json(self.path / "config.json", self.config)
        write_json(self.path / "system.json", self.system)

    @classmethod
    def open(cls, path: Path | str, iteration: int | None = None) -> ExperimentManager:
        """The run in the folder `path`, to go on with or to read.

        Args:
            path: a run folder.
            iteration: where given, rows of `metrics.jsonl` later than it are dropped (atomically): they
                belong to the stretch between the last checkpoint and the crash, which will be run again.
        """
        path = Path(path)
        if path.name in ("", ".."):  # the working directory, whose own name is the run's
            path = path.resolve()
        if not (path / "config.json").is_file():
            raise CheckpointNotFoundError(
                f"{path} is not a run folder: it has no config.json; give a folder that `train` made, "
                "such as experiments/MAML_Sinusoid_20260101-120000"
            )
        run = cls.__new__(cls)
        run.config = read_json(path / "config.json")
        if not isinstance(run.config, dict):
            raise DataError(f"{path / 'config.json'} holds a {type(run.config).__name__}, not a mapping")
        system = path / "system.json"
        run.system = read_json(system) if system.is_file() else {}
        run.name = path.name.rsplit("_", 1)[0]
        run._set_paths(path)
        if iteration is not None:
            run._rewrite([row for row in run.rows() if (row.get("iteration") or 0) <= iteration])
        return run

    def _set_paths(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.plots, self.tensorboard = (
            path / part for part in ("checkpoints", "plots", "tensorboard")
        )
        self.metrics_path = path / "metrics.jsonl"
        self._whole = False  # whether the last line is known to end
        with writing(path):
            for folder in (self.checkpoints, self.plots, self.tensorboard):
                folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[ExperimentManager]:
        """The run, with its folder to itself while the block lasts, where the system can say so (not on Windows).

        Raises:
            ConfigurationError: another process is at work in it.
        """
        with contextlib.ExitStack() as held:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                handle = os.open(self.path, os.O_RDONLY)
                held.callback(os.close, handle)  # which ends the lock, as does the end of the process
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigurationError(
                        f"another process is at work in {self.path}; wait until it is done, or stop it"
                    ) from None
            yield self

    def checkpoint_path(self, name: str) -> Path:
        """`checkpoints/NAME.npz`; `name` with or without the suffix."""
        return self.checkpoints / (name if name.endswith(".npz") else f"{name}.npz")

    def discard(self) -> None:
        """Remove the run folder where the run came to nothing: no row, no result, no checkpoint."""
        kept = {self.path / name for name in ("config.json", "system.json")}
        if {path for path in self.path.rglob("*") if path.is_file()} == kept:
            shutil.rmtree(self.path, ignore_errors=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append `row`, which should have an `iteration`, to `metrics.jsonl`."""
        with writing(self.metrics_path):
            if not self._whole:
                if _cut_short(self.metrics_path):
                    self._rewrite(self.rows())
                self._whole = True
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def rows(self) -> list[dict[str, Any]]:
        """Every logged row. A last line that a crash cut short is left out."""
        if not self.metrics_path.is_file():
            return []
        rows = []
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise DataError(f"{self.metrics_path}, line {number}: not valid JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise DataError(f"{self.metrics_path}, line {number}: expected a mapping, got {line[:40]!r}")
            rows.append(row)
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.metrics_path, "".join(_line(row) for row in rows))

    def history(self) -> dict[str, tuple[list[int], list[float]]]:
        """Metric → (iterations, values), for every numeric metric that was logged."""
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows():
            for key, value in row.items():
                if key != "iteration" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    xs, ys = columns.setdefault(key, ([], []))
                    xs.append(row.get("iteration", 0))
                    ys.append(value)
        return columns

    def finish(self, report: Mapping[str, Any] | None = None) -> None:
        """Write `metrics.json` and `full_report.json`; may be called again after a resume."""
        rows = self.rows()
        last = rows[-1] if rows else {}
        history = {key: {"iteration": xs, "value": ys} for key, (xs, ys) in self.history().items()}
        write_json(self.path / "metrics.json", {"last": last, "history": history})
        write_json(
            self.path / "full_report.json",
            {
                "name": self.name,
                "finished": _now(),
                "config": self.config,
                "system": self.system,
                "last": last,
                **(report or {}),
            },
        )


def default_name(config: Mapping[str, Any]) -> str:
    """`MAML_Sinusoid`: the learner's class and the task families (`Mixed` from three on)."""
    from ..learners import LEARNERS

    algorithm = str(config.get("meta_learning", {}).get("algorithm", "run"))
    learner = LEARNERS.get(algorithm, "").partition(":")[2].removesuffix("Learner") or _camel(algorithm)
    families = config.get("task_distribution", {}).get("task_families") or []
    families = [families] if isinstance(families, str) else list(families)
    names = [_camel(str(family).removesuffix("_classification")) for family in families]
    return "_".join([learner, "Mixed" if len(names) > 2 else "".join(names)]).strip("_")


def open_run(path: Path | str, command: str) -> ExperimentManager:
    """The run folder `path`, to go on with by `command`.

    Raises:
        ConfigurationError: another command made it.
    """
    manager = ExperimentManager.open(path)
    by = made_by(manager.config)
    if command != by:
        own = f"`{by}`; go on with `{by} --resume {path}`" if by else "no command that goes on"
        raise ConfigurationError(f"{path} was made by {own}")
    return manager


def made_by(config: Any) -> str | None:
    """The command whose run has `config`; None where there is none."""
    keys = config if isinstance(config, Mapping) else ()
    return next((name for name, key in _COMMANDS.items() if key in keys), None)


def seed_of(config: Mapping[str, Any]) -> int | list[int] | None:
    """The seed, from whichever section states it, or the seeds of an experiment that repeats itself."""
    own = config.get("seeds")
    return next((s["seed"] for s in config.values() if isinstance(s, Mapping) and "seed" in s), own)


def system_info(seed: int | list[int] | None = None) -> dict[str, Any]:
    """Chip, memory, OS, versions, seed and git commit; what cannot be found out is null."""
    import platform
    import sys

    from ..devices import device_info

    packages = ("efficientai-toolkit", "mlx", "numpy", "pydantic", "matplotlib")
    return jsonable(
        {
            "started": _now(),
            "seed": seed,
            "command": sys.argv,
            "git_commit": _git_commit(),
            "os": platform.platform(),
            "python": platform.python_version(),
            "versions": {package: _version(package) for package in packages},
            "device": device_info(),
        }
    )


def _fresh_folder(output: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:  # two runs may begin within one second, in two processes
        path = output / (f"{name}_{stamp}" if number == 1 else f"{name}_{stamp}-{number}")
        with writing(path):
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), allow_nan=False) + "\n"


def _cut_short(path: Path) -> bool:
    """Whether a crash left the last line without its end."""
    content = path.read_bytes() if path.is_file() else b""
    return bool(content) and not content.endswith(b"\n")


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit checked out where the command was given, or null outside a repository."""
    try:
        here = Path.cwd()
        if not any((folder / ".git").exists() for folder in (here, *here.parents)):
            return None  # a Mac without the command line tools would ask the user to install git
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

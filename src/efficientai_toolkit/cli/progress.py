"""Progress of a run: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..intervals import interval
from ..runs.train import Watch


def watch(stream: TextIO) -> LineWatch | LiveWatch:
    """Live where `stream` is a terminal."""
    return LiveWatch(stream) if stream.isatty() else LineWatch(stream)


class LineWatch(Watch):
    """A line for every validation, and one for the training loss every few seconds."""

    run: Path | None = None  # its folder, once it has begun

    def __init__(self, stream: TextIO, every: float = 5.0):
        self.stream, self.every = stream, every

    def begin(self, run: Path, first: int, total: int, tasks: int) -> None:
        self.run, self.total, self.shown = run, total, time.monotonic()
        word = f"from iteration {first} to {total}" if first else f"{total} iterations"
        self.say(f"run {run}: {word} of {tasks} tasks")

    def row(self, row: Mapping[str, Any]) -> None:
        if "val_loss" in row:
            self.say(f"iteration {row['iteration']}/{self.total}  {validation(row)}")
        elif time.monotonic() - self.shown >= self.every:
            self.say(f"iteration {row['iteration']}/{self.total}  {training(row)}")

    def say(self, text: str) -> None:
        self.shown = time.monotonic()
        print(text, file=self.stream, flush=True)


class LiveWatch(Watch):
    """A bar with iteration, loss, accuracy, tasks a second and time left; validations scroll above it."""

    run: Path | None = None  # its folder, once it has begun

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=stream, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def begin(self, run: Path, first: int, total: int, tasks: int) -> None:
        self.console.print(f"run {run}", soft_wrap=True)
        self.run, self.tasks, self.first, self.total = run, tasks, first, total
        self.task = self.bar.add_task("meta-training", total=total, completed=first, metrics="")
        self.began = self.moved = self.asked = time.monotonic()
        self.bar.start()

    def step(self, iteration: int, latest: Callable[[], dict[str, float]]) -> None:
        clock = time.monotonic()
        if clock - self.asked > 0.5:  # waiting for numbers breaks the queue; twice a second costs nothing
            self.asked = clock
            rate = (iteration - self.first) * self.tasks / (clock - self.began)
            self.bar.update(self.task, completed=iteration, metrics=training({**latest(), "tasks_per_second": rate}))
        elif clock - self.moved > 0.1:
            self.moved = clock
            self.bar.update(self.task, completed=iteration)

    def row(self, row: Mapping[str, Any]) -> None:
        if "val_loss" in row:
            self.bar.update(self.task, completed=row["iteration"])
            self.console.print(f"iteration {row['iteration']}/{self.total}  {validation(row)}", soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def end(self) -> None:
        self.bar.stop()


def training(row: Mapping[str, Any]) -> str:
    """`loss 0.512  accuracy 77.1 %  1,423 tasks/s`"""
    parts = []
    if "query_loss" in row:
        parts.append(f"loss {row['query_loss']:.4g}")
    if "query_accuracy" in row:
        parts.append(f"accuracy {interval(row['query_accuracy'], None, percent=True)}")
    if "tasks_per_second" in row:
        parts.append(f"{row['tasks_per_second']:,.0f} tasks/s")
    return "  ".join(parts)


def validation(row: Mapping[str, Any]) -> str:
    """`validation: loss 0.71 ± 0.23 (0.809 before adaptation), accuracy 72.9 % ± 8.0 (45.3 % before adaptation)`"""
    parts = []
    loss, untouched = row.get("val_loss"), row.get("val_loss_before")
    # A learner that takes no steps has nothing before them; its two losses differ by rounding.
    steps = loss is None or untouched is None or not math.isclose(loss, untouched, rel_tol=1e-4)
    for name, percent in (("loss", False), ("accuracy", True)):
        if f"val_{name}" not in row:
            continue
        value, before = row[f"val_{name}"], row.get(f"val_{name}_before")
        text = f"{name} {interval(value, row.get(f'val_{name}_ci95'), percent=percent)}"
        if before is not None and steps:
            text += f" ({interval(before, None, percent=percent)} before adaptation)"
        parts.append(text)
    return "validation: " + ", ".join(parts)

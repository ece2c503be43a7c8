"""GLUE (Wang et al. 2019) in its original files, and what it shares with SuperGLUE: tasks with their own metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..errors import DataError, DataNotFoundError, TaskSamplingError, did_you_mean
from .base import TaskConfig, where
from .classes import shuffled
from .text import Corpus, Text, TextFamily

Row = tuple[Text, str]


class TextTask(NamedTuple):
    """One benchmark task.

    Args:
        folder: below the benchmark's.
        labels: in the order of their numbers.
        metric: a name in `METRICS`.
        parse: a row as read → its text (or pair) and label.
        header: whether its tables have one (GLUE).
    """

    folder: str
    labels: tuple[str, ...]
    metric: str
    parse: Callable[[Any], Row]
    header: bool = True


# --- metrics ---------------------------------------------------------------------------------------------------------


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float((predicted == truth).mean())


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the classes' F1; a class that is neither predicted nor there does not count."""
    scores = []
    for label in np.union1d(predicted, truth):
        hit = ((predicted == label) & (truth == label)).sum()
        scores.append(2 * hit / ((predicted == label).sum() + (truth == label).sum()))
    return float(np.mean(scores))


def matthews(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Matthews correlation of two binary labellings; 0 where one of them is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.corrcoef(predicted, truth)[0, 1]
    return float(value) if np.isfinite(value) else 0.0


def accuracy_and_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean of accuracy and macro F1: SuperGLUE's number for CB."""
    return (accuracy(predicted, truth) + macro_f1(predicted, truth)) / 2


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "accuracy_and_f1": accuracy_and_f1,
    "matthews": matthews,
}


# --- GLUE ------------------------------------------------------------------------------------------------------------

TASKS: dict[str, TextTask] = {
    "cola": TextTask("CoLA", ("0", "1"), "matthews", lambda row: (row[3], row[1]), header=False),
    "qnli": TextTask(
        "QNLI",
        ("entailment", "not_entailment"),
        "accuracy",
        lambda row: ((row["question"], row["sentence"]), row["label"]),
    ),
    "rte": TextTask(
        "RTE",
        ("entailment", "not_entailment"),
        "accuracy",
        lambda row: ((row["sentence1"], row["sentence2"]), row["label"]),
    ),
    "sst2": TextTask("SST-2", ("0", "1"), "accuracy", lambda row: (row["sentence"].strip(), row["label"])),
    "wnli": TextTask("WNLI", ("0", "1"), "accuracy", lambda row: ((row["sentence1"], row["sentence2"]), row["label"])),
}


class BenchmarkFamily(TextFamily):
    """Tasks of a benchmark as N-way K-shot classification: the classes of a task are its labels, in random order.

    Split `train` is the published training rows but a fifth, `val` is that fifth, `test` the published development
    rows (test labels are not public): the splits share labels, not rows.

    Settings (`task_params`), besides those of `TextFamily`:
        task: its name, or a list of names; with a list, every episode is of one of them.
    """

    known_params = TextFamily.known_params | {"task"}
    max_length = 128
    tasks_known: ClassVar[Mapping[str, TextTask]]
    folder: ClassVar[str]

    def source(self, config: TaskConfig) -> tuple:
        given = config.task_params.get("task", next(iter(self.tasks_known)))
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, Sequence) or not names:
            raise TaskSamplingError(f"{where(config)}: task is {given!r}; expected a name or a list of them")
        for name in names:
            if name not in self.tasks_known:
                raise TaskSamplingError(f"{where(config)}: unknown task {name!r}{did_you_mean(name, self.tasks_known)}")
        return (tuple(names),)

    def rows(self, name: str, part: str, *source: Any) -> list[Row]:
        """Texts and labels of a published part, `train` or `dev`; empty where that part is not there."""
        raise NotImplementedError

    def corpus(self, tasks: Sequence[str] = (), *source: Any) -> Corpus:
        texts, labels, names, groups = [], [], [], []
        splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for task in tasks:
            train, dev = self.rows(task, "train", *source), self.rows(task, "dev", *source)
            if not dev:
                raise DataNotFoundError(f"no development rows of {task} in {self.root / self.folder}")
            order = shuffled(len(train), f"{self.folder} {task}")
            cut = len(train) // 5
            parts = {"train": [train[i] for i in order[cut:]], "val": [train[i] for i in order[:cut]], "test": dev}
            for split, rows in parts.items():
                for label in self.tasks_known[task].labels:
                    own = [text for text, its in rows if its == label]
                    if own:
                        splits[split].append(len(names))
                        texts += own
                        labels += [len(names)] * len(own)
                        names.append(f"{split}/{task}/{label}")
                        groups.append(task)
        return Corpus(texts, np.array(labels), names, splits, groups)

    def _within(self, config: TaskConfig) -> bool:
        return True  # labels of different tasks never meet in an episode


class Glue(BenchmarkFamily):
    """The small GLUE tasks: CoLA, QNLI (development rows only), RTE, SST-2, WNLI."""

    tasks_known = TASKS
    folder = "glue"

    def rows(self, name: str, part: str, *source: Any) -> list[Row]:
        return read_glue(self.root, name, part)


def read_glue(root: Path, name: str, part: str) -> list[Row]:
    """Rows of `train.tsv` or `dev.tsv`; empty where that file is not there."""
    task = TASKS[name]
    path = root / "glue" / task.folder / f"{part}.tsv"
    if not path.parent.is_dir():
        raise DataNotFoundError(f"GLUE's {task.folder} is not at {path.parent}; name its parent with --data-dir")
    return list(checked(path, task, _tsv(path, task.header))) if path.is_file() else []


def _tsv(path: Path, header: bool) -> Iterator[tuple[int, Any]]:
    """(line, columns) of a table without quoting; by name where it has a header."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    names = lines[0].rstrip("\r").split("\t") if header else []
    for number, line in enumerate(lines[int(header) :], 1 + int(header)):
        if line:
            cells = line.rstrip("\r").split("\t")
            if header and len(cells) != len(names):
                raise DataError(f"{path}, line {number}: {len(cells)} columns where the header has {len(names)}")
            yield number, dict(zip(names, cells, strict=True)) if header else cells


def checked(path: Path, task: TextTask, rows: Iterator[tuple[int, Any]]) -> Iterator[Row]:
    for number, row in rows:
        try:
            text, label = task.parse(row)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a row of {task.folder} ({error!r})") from None
        if label not in task.labels:
            raise DataError(f"{path}, line {number}: label {label!r}; expected one of {', '.join(task.labels)}")
        yield text, label

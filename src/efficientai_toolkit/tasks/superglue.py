"""SuperGLUE (Wang et al. 2019) in its original files, and FewGLUE (Schick & Schütze 2021), 32 rows of each task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, DataNotFoundError, TaskSamplingError
from .base import TaskConfig, where
from .glue import BenchmarkFamily, Row, TextTask, checked

_ENTAILMENT = ("entailment", "contradiction", "neutral")
_QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def _copa(row: Any) -> Row:
    """Which of two: one text, since the model is given one text (or pair) an example."""
    premise = f"{row['premise']} {_QUESTIONS[row['question']]}"
    return (premise, f"First: {row['choice1']} Second: {row['choice2']}"), str(row["label"])


def _wsc(row: Any) -> Row:
    target = row["target"]
    return (row["text"], f"{target['span2_text']} is {target['span1_text']}"), str(row["label"]).lower()


TASKS: dict[str, TextTask] = {
    "boolq": TextTask(
        "BoolQ",
        ("false", "true"),
        "accuracy",
        lambda row: ((row["question"], row["passage"]), str(row["label"]).lower()),
    ),
    "cb": TextTask(
        "CB", _ENTAILMENT, "accuracy_and_f1", lambda row: ((row["premise"], row["hypothesis"]), row["label"])
    ),
    "copa": TextTask("COPA", ("0", "1"), "accuracy", _copa),
    "rte": TextTask(
        "RTE",
        ("entailment", "not_entailment"),
        "accuracy",
        lambda row: ((row["premise"], row["hypothesis"]), row["label"]),
    ),
    "wic": TextTask(
        "WiC",
        ("false", "true"),
        "accuracy",
        lambda row: ((f"{row['word']}: {row['sentence1']}", row["sentence2"]), str(row["label"]).lower()),
    ),
    "wsc": TextTask("WSC", ("false", "true"), "accuracy", _wsc),
}


class SuperGlue(BenchmarkFamily):
    """The small SuperGLUE tasks: BoolQ, CB, COPA, RTE, WiC, WSC.

    Settings (`task_params`), besides those of `BenchmarkFamily`:
        few: take the training rows from FewGLUE's 32 of each task; false.
    """

    known_params = BenchmarkFamily.known_params | {"few"}
    tasks_known = TASKS
    folder = "superglue"

    def source(self, config: TaskConfig) -> tuple:
        few = config.task_params.get("few", False)
        if not isinstance(few, bool):
            raise TaskSamplingError(f"{where(config)}: few is {few!r}; expected true or false")
        return *super().source(config), few

    def rows(self, name: str, part: str, *source: Any) -> list[Row]:
        (few,) = source or (False,)
        return read_superglue(self.root, name, part, few=few)


def read_superglue(root: Path, name: str, part: str, *, few: bool = False) -> list[Row]:
    """Rows of a task's training (`few`: FewGLUE's 32) or development file; empty where that file is not there."""
    task = TASKS[name]
    path = root / "superglue" / task.folder / ("train.jsonl" if part == "train" else "val.jsonl")
    if few and part == "train":
        path = root / "fewglue" / task.folder / "train.jsonl"
    if not path.parent.is_dir():
        raise DataNotFoundError(f"{task.folder} is not at {path.parent}; name its parent's parent with --data-dir")
    return list(checked(path, task, _jsonl(path))) if path.is_file() else []


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None

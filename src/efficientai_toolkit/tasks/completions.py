"""Files of prompts and completions, for language models: JSON lines, every bad row named by its line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, did_you_mean
from .labelled import decoded, fail, json_lines, read_bytes


class Completion(NamedTuple):
    """What is given, and what the model is to learn to say after it."""

    prompt: str
    completion: str


def read_completions(path: str | Path) -> list[Completion]:
    """The rows of a `.jsonl` file: `{"prompt": …, "completion": …}`, or `{"text": …}` where all is to be learned.

    Raises:
        DataError: with the line of every bad row (the first five of them).
    """
    text = decoded(read_bytes(path), str(path))
    rows: list[Completion] = []
    faults: list[str] = []
    for number, row in json_lines(text, faults):
        fault = _fault(row)
        if fault:
            faults.append(f"line {number}: {fault}")
        else:
            rows.append(Completion(row.get("prompt", ""), row.get("completion", row.get("text"))))
    fail(faults, str(path))
    if not rows:
        raise DataError(f"{path} is empty; expected an object with prompt and completion in every line")
    return rows


def _fault(row: object) -> str | None:
    if not isinstance(row, dict):
        return f"{type(row).__name__}, expected an object with prompt and completion"
    known = ("text",) if "text" in row else ("prompt", "completion")
    for key in row:
        if key not in known:
            return f"unknown key {key!r}{did_you_mean(key, known)}; expected {' and '.join(known)}"
    for key in known:
        if not isinstance(row.get(key), str):
            return f"{key} is missing" if key not in row else f"{key} is {row[key]!r}, not a string"
    return None if row[known[-1]].strip() else f"{known[-1]} is empty"

"""Files of prompts and completions, or chats, for language models: JSON lines, every bad row named by its line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, did_you_mean
from .labelled import decoded, fail, json_lines, read_bytes

_ROLES = ("system", "developer", "user", "assistant")


class Completion(NamedTuple):
    """What is given, and what the model is to learn to say after it."""

    prompt: str | list[dict[str, str]] | None  # a chat's messages so far (role, content); None where all is learned
    completion: str


def read_completions(path: str | Path) -> list[Completion]:
    """The rows of a `.jsonl` file.

    A row is `{"prompt": …, "completion": …}`; a chat, `{"messages": [{"role": …, "content": …}, …]}`, of which the last
    message, the assistant's, is the completion; or `{"text": …}` where all is to be learned.

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
            rows.append(_row(row))
    fail(faults, str(path))
    if not rows:
        raise DataError(f"{path} is empty; expected an object with prompt and completion in every line")
    return rows


def _row(row: dict) -> Completion:
    if "messages" in row:
        return Completion(row["messages"][:-1], row["messages"][-1]["content"])
    return Completion(None, row["text"]) if "text" in row else Completion(row["prompt"], row["completion"])


def _fault(row: object) -> str | None:
    if not isinstance(row, dict):
        return f"{type(row).__name__}, expected an object with prompt and completion"
    if "messages" in row:
        return _chat_fault(row)
    known = ("text",) if "text" in row else ("prompt", "completion")
    return _keys_fault(row, known) or (None if row[known[-1]].strip() else f"{known[-1]} is empty")


def _chat_fault(row: dict) -> str | None:
    messages = row["messages"]
    if fault := _unknown(row, ("messages",)):
        return fault
    if not isinstance(messages, list) or len(messages) < 2:
        return "messages is no list of two at least, the last of them the assistant's"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {message!r}, expected an object with role and content"
        fault = _keys_fault(message, ("role", "content"))
        if not fault and message["role"] not in _ROLES:
            fault = f"role is {message['role']!r}{did_you_mean(message['role'], _ROLES)}"
        if fault:
            return f"message {number}: {fault}"
    if messages[-1]["role"] != "assistant":
        return f"the last message is the {messages[-1]['role']}'s, expected the assistant's"
    return None if messages[-1]["content"].strip() else "the last message is empty"


def _keys_fault(given: dict, known: tuple[str, ...]) -> str | None:
    """What is wrong with an object that has a string at each of `known` and nothing else."""
    if fault := _unknown(given, known):
        return fault
    for key in known:
        if not isinstance(given.get(key), str):
            return f"{key} is missing" if key not in given else f"{key} is {given[key]!r}, not a string"
    return None


def _unknown(given: dict, known: tuple[str, ...]) -> str | None:
    for key in given:
        if key not in known:
            return f"unknown key {key!r}{did_you_mean(key, known)}; expected {' and '.join(known)}"
    return None

"""Every command and snippet of the documentation is run, long ones with quick settings.

A fenced block can be preceded by `<!-- test: skip, REASON -->`. Blocks of one document run in order, in one folder:
Python blocks share their names, shell lines see the files that earlier ones made.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from efficientai_toolkit.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- test: (?P<test>[^>]*?) -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SET_UP = "(command -v uv >/dev/null || python3 -m pip install -q uv) && "
# What a command is given so that it ends within a second or two; what it does is the same.
QUICK = {
    "train": ["--iterations", "20", "--set", "task_distribution.num_val_tasks=4"],
    "evaluate": ["--episodes", "20"],
    "compare": ["--episodes", "10", "--iterations", "20"],
    "benchmark": ["--quick"],
    "reproduce": ["--quick"],
    "continual": ["--quick"],
    "melpa": ["--quick"],
}
# Images are the long part.
SMALL = ["--iterations", "3", "--set", "model.hidden_dim=4", "--set", "evaluation.episodes=8"]
ELSEWHERE = ("uv run pytest", "uv sync", "bash .ci/run", "uv run ruff", "uv run python examples/")
NEEDS_DATA = ("omniglot", "intents", "clinc", "banking", "mnist")


class Block(NamedTuple):
    kind: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if not (match["test"] or "").startswith(("skip", "learner")):
            found.append(Block(match["kind"], match["text"], text[: match.start()].count("\n") + 1))
    return [block for block in found if block.kind in ("bash", "python")]


@pytest.fixture
def folder(tmp_path):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path, where: str) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{where}: {shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line for raw in joined.splitlines() if (line := raw.split("  #")[0].strip()) and not line.startswith("#")]


def quickened(line: str) -> list[str] | None:
    """The arguments that stand for a documented line; None where another test runs it."""
    line = line.removeprefix(SET_UP)
    if line.startswith(ELSEWHERE):
        return None
    line = line.removeprefix("uv run ")
    assert line.startswith("efficientai-toolkit "), f"a line that no test knows how to run: {line!r}"
    words = shlex.split(line)
    name = words[1].removeprefix("meta-learning-peft:")
    quick = [*QUICK.get(name, []), *(SMALL if name == "train" and "omniglot" in line else [])]
    return [str(Path(sys.executable).parent / "efficientai-toolkit"), *words[1:], *quick]


def call(command: list[str], where: str, capsys) -> None:
    """The entry point of `command` within this process, which has imported everything already."""
    status: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
    said = capsys.readouterr()
    assert status == 0, f"{where}: {shlex.join(command)}\n{said.out[-2000:]}\n{said.err[-3000:]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands(path, folder, data_dir_or_none, monkeypatch, capsys):
    """Those of the README as the processes that they are, those of the other documents within this one."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("COLUMNS", "100")
    if data_dir_or_none is not None:
        monkeypatch.setenv("EFFICIENTAI_DATA_DIR", str(data_dir_or_none))
    for block in blocks(path):
        if block.kind != "bash":
            continue
        for line in commands(block.text):
            words = quickened(line)
            if words is None or (data_dir_or_none is None and any(name in line for name in NEEDS_DATA)):
                continue
            where = f"{path.name}, line {block.line}"
            if path.name == "README.md":
                run(words, folder, where)
            else:
                call(words, where, capsys)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_snippets(path, folder):
    texts = [block.text for block in blocks(path) if block.kind == "python"]
    if texts:
        run([sys.executable, "-c", "\n".join(texts)], folder, path.name)


def test_the_examples_run(folder):
    for example in sorted((ROOT / "examples").glob("*.py")):
        if example.name == "quick_start.py":
            run([sys.executable, str(example)], folder, example.name)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"

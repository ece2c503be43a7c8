"""A table is rows; a row is a configuration to train, tasks to evaluate on, and the paper's number.

Every row is trained in a run folder of its own, so it resumes where it was stopped, and leaves one JSON record when it
is done; a finished row is not run again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import MetaLearningConfig
from ...errors import ConfigurationError, did_you_mean
from ...files import read_json, write_json, write_text
from ...runs.build import restore
from ...runs.evaluate import evaluate_tasks
from ...runs.experiment import system_info
from ...runs.train import Watch, resume, train
from ...tasks.build import build_splits

QUICK_ITERATIONS, QUICK_EPISODES = 20, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained learner: one cell of the table.

    Args:
        name: of the row's run and record.
        line, column: where it stands in the table.
        config: what differs from the table's base configuration.
        paper: the published number, None where there is none.
        source: whose it is.
        note: what a reader should know.
    """

    name: str
    line: str
    column: str
    config: Mapping[str, Any]
    paper: float | None = None
    source: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows with one base configuration.

    Args:
        title: heading.
        about: the protocol, in a sentence or two.
        base: configuration of every row.
        evaluation: what of `task_distribution` differs when evaluating.
        percent: show accuracy in percent, else the loss.
    """

    name: str
    title: str
    about: str
    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    evaluation: Mapping[str, Any]
    percent: bool = False

    def chosen(self, names: Sequence[str]) -> list[Row]:
        """The rows whose name is, or matches (`maml-*`), one of `names`; all where there are none."""
        known = [row.name for row in self.rows]
        for name in names:
            if not fnmatch.filter(known, name):
                raise ConfigurationError(f"table {self.name!r} has no row {name!r}{did_you_mean(name, known)}")
        return [row for row in self.rows if not names or any(fnmatch.fnmatch(row.name, name) for name in names)]

    def run(self, row: Row, folder: Path, **options: Any) -> dict[str, Any]:
        """The record of a row; see `run_row`."""
        return run_row(self, row, folder, **options)

    def write(self, folder: Path) -> Path:
        """The table of what is finished; see `write_table`."""
        return write_table(self, folder)

    def config(self, row: Row, folder: Path, *, seed: int, data_dir: Path | None, quick: bool) -> MetaLearningConfig:
        """The whole configuration of a row."""
        place = {"output_dir": str(folder / "runs"), "checkpoint_dir": str(folder / "checkpoints" / row.name)}
        if data_dir is not None:
            place["data_dir"] = str(data_dir)
        short = {"num_meta_iterations": QUICK_ITERATIONS, "meta_batch_size": 2} if quick else {}
        layers = (self.base, row.config, {"paths": place, "meta_learning": {"seed": seed, **short}})
        merged: dict[str, Any] = {}
        for layer in layers:
            for section, values in layer.items():
                merged[section] = {**merged.get(section, {}), **values}
        if quick:
            merged["task_distribution"] |= {"num_val_tasks": 2, "num_test_tasks": 2}
        return MetaLearningConfig.from_dict(merged)


def run_row(
    table: Table,
    row: Row,
    folder: Path,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    quick: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train (or go on with) a row and evaluate it; its record, which is also `folder/ROW.json`."""
    file = folder / f"{row.name}.json"
    if file.is_file():
        return read_json(file)
    config = table.config(row, folder, seed=seed, data_dir=data_dir, quick=quick)
    begun = sorted((folder / "runs").glob(f"{row.name}_*/config.json"))
    report = resume(begun[-1].parent, watch=watch) if begun else train(config, name=row.name, watch=watch)
    if report["stopped"] == "interrupted":
        raise KeyboardInterrupt
    built = restore(report["checkpoints"]["last"])
    section = config.task_distribution.model_copy(update=dict(table.evaluation))
    if quick:
        section = section.model_copy(update={"num_test_tasks": QUICK_EPISODES})
    test = build_splits(section, data_dir=data_dir, seed=seed).test
    trained = config.num_inner_steps
    found = evaluate_tasks(
        built.learner, test, episodes=section.num_test_tasks, steps=sorted({0, trained, *config.evaluation.steps})
    ).report
    record = {
        "row": row.name,
        "line": row.line,
        "column": row.column,
        "quick": quick,
        "ours": found["headline"],
        "paper": row.paper,
        "source": row.source,
        "note": row.note,
        "train_seconds": report["seconds"],
        "iterations": report["iterations"],
        "command": f"efficientai-toolkit meta-learning-peft:reproduce {table.name} {row.name}",
        "config": {name: section for name, section in config.to_dict().items() if name != "paths"},
        "evaluation": found,
        "system": {name: value for name, value in system_info(seed).items() if name != "command"},
    }
    write_json(file, record)
    return record


def records(table: Table, folder: Path) -> list[dict[str, Any]]:
    """What is finished, in the table's order."""
    files = (folder / f"{row.name}.json" for row in table.rows)
    return [read_json(file) for file in files if file.is_file()]


def markdown(table: Table, found: Iterable[Mapping[str, Any]]) -> str:
    """The table as it stands: ours ± the 95 % interval, the paper's number in brackets."""
    found = list(found)
    columns = list(dict.fromkeys(row.column for row in table.rows if any(r["row"] == row.name for r in found)))
    lines = list(dict.fromkeys(row.line for row in table.rows if any(r["row"] == row.name for r in found)))
    cells = {(r["line"], r["column"]): r for r in found}
    published = {row.name: row.paper for row in table.rows}
    text = [f"# {table.title}", "", table.about, ""]
    if any(r["quick"] for r in found):
        text += ["**Made with `--quick`: these numbers show that it runs, and nothing else.**", ""]
    text += ["| | " + " | ".join(columns) + " | inner steps | iterations, rate | training |"]
    text += ["|---" * (len(columns) + 4) + "|"]
    for line in lines:
        own = [cells[line, column] for column in columns if (line, column) in cells]
        shown = [
            _cell(cells[line, column], published, table.percent) if (line, column) in cells else ""
            for column in columns
        ]
        seconds = ", ".join(f"{r['train_seconds']:.0f} s" for r in own)
        steps = ", ".join(dict.fromkeys(str(r["ours"]["steps"]) for r in own))
        length = ", ".join(dict.fromkeys(_length(r) for r in own))
        text.append(f"| {line} | " + " | ".join(shown) + f" | {steps} | {length} | {seconds} |")
    shown_rows = {r["row"] for r in found}
    notes = dict.fromkeys(f"{row.line}: {row.note}" for row in table.rows if row.note and row.name in shown_rows)
    sources = dict.fromkeys(row.source for row in table.rows if row.source and row.name in shown_rows)
    text += ["", *(f"* {note}" for note in notes)]
    if sources:
        text += [f"* Papers' numbers: {'; '.join(sources)}."]
    return "\n".join(text).rstrip() + "\n"


def write_table(table: Table, folder: Path) -> Path:
    """`folder/NAME.md`, of what is finished."""
    path = folder / f"{table.name}.md"
    write_text(path, markdown(table, records(table, folder)))
    return path


def _length(record: Mapping[str, Any]) -> str:
    return f"{record['iterations']:,} at {record['config']['meta_learning']['outer_lr']:g}"


def _cell(record: Mapping[str, Any], published: Mapping[str, float | None], percent: bool) -> str:
    mean, ci95, paper = record["ours"]["mean"], record["ours"]["ci95"], published[record["row"]]
    if mean is None:
        return "diverged"
    if percent:
        ours = f"**{100 * mean:.2f}**" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")
        return ours if paper is None else f"{ours} ({paper:.2f})"
    digits = 3 if mean >= 0.1 else 4
    ours = f"**{mean:.{digits}f}**" + ("" if ci95 is None else f" ± {ci95:.{digits}f}")
    return ours if paper is None else f"{ours} ({paper:g})"

"""A table is rows; a row is a configuration to train, tasks to evaluate on, and the paper's number.

Every row is trained in a run folder of its own, so it resumes where it was stopped, and leaves one JSON record when it
is done; a finished row is not run again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...config import MetaLearningConfig
from ...errors import ConfigurationError, ToolkitError, did_you_mean
from ...files import read_json, write_json, write_text
from ...runs.build import restore
from ...runs.evaluate import evaluate_tasks
from ...runs.experiment import system_info
from ...runs.train import Watch, resume, train
from ...settings import check_seed
from ...tasks.build import build_splits

QUICK_ITERATIONS, QUICK_EPISODES = 20, 8
_UNSET = object()


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
        evaluation: what of `task_distribution` differs when evaluating, over the table's.
        trained_as: the row whose training this one shares; default: its own.
    """

    name: str
    line: str
    column: str
    config: Mapping[str, Any]
    paper: float | None = None
    source: str = ""
    note: str = ""
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained_as: str = ""


class Run(NamedTuple):
    """How a row is run.

    Args:
        folder: of the table's records, runs and checkpoints.
        name: of the row's record and run: the row's own, and with a seed other than 0 that too.
        seed, data_dir, quick, watch: see `Table.run`.
    """

    folder: Path
    name: str
    seed: int
    data_dir: Path | None
    quick: bool
    watch: Watch | None


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

    def run(
        self,
        row: Row,
        folder: Path,
        *,
        seed: int = 0,
        data_dir: Path | None = None,
        quick: bool = False,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """The record of a row, read from `folder/ROW.json` (`ROW-seedN.json`) or made by `measure` and written there.

        A record that says it was made under other settings is made anew; a quick one never replaces a full one.

        Args:
            row: of this table.
            folder: of the table's records, runs and checkpoints.
            seed: of weights, tasks and batches.
            data_dir: parent of the data sets.
            quick: try the machinery; the record says that its numbers mean nothing.
            watch: is told how the training goes.

        Raises:
            ConfigurationError: see `check_seed`.
        """
        self.check_seed([row], seed)
        name = row.name if seed == 0 else f"{row.name}-seed{seed}"
        file, protocol = folder / f"{name}.json", self.protocol(row)
        if file.is_file():
            record = read_json(file)
            if record["quick"] <= quick and record.get("protocol", protocol) == protocol:
                return record
        started = time.perf_counter()
        measured = self.measure(row, Run(folder, name, seed, data_dir, quick, watch))
        options = (f" --seed {seed}" if seed else "") + (" --quick" if quick else "")
        record = {
            "row": row.name,
            "line": row.line,
            "column": row.column,
            "quick": quick,
            "seed": seed,
            "paper": row.paper,
            "source": row.source,
            "note": row.note,
            "protocol": protocol,
            **measured,
            "seconds": time.perf_counter() - started,
            "command": f"efficientai-toolkit meta-learning-peft:reproduce {self.name} {row.name}{options}",
            "system": {key: value for key, value in system_info(seed).items() if key != "command"},
        }
        write_json(file, record)
        return record

    def measure(self, row: Row, run: Run) -> dict[str, Any]:
        """What is measured of a row, as plain values: `ours` (`metric`, `mean`, `ci95`), `train_seconds`, details.

        Here: a learner is trained and evaluated on test tasks.
        """
        config = self.config(row, seed=run.seed, quick=run.quick)
        seeded = f"-seed{run.seed}" if run.seed else ""
        report = trained(config, run, f"{row.trained_as or row.name}{seeded}")
        built = restore(report["checkpoints"]["last"])
        section = config.task_distribution.model_copy(update={**self.evaluation, **row.evaluation})
        if run.quick:
            section = section.model_copy(update={"num_test_tasks": QUICK_EPISODES})
        test = build_splits(section, data_dir=run.data_dir, seed=run.seed).test
        steps = sorted({0, config.num_inner_steps, *config.evaluation.steps})
        found = evaluate_tasks(built.learner, test, episodes=section.num_test_tasks, steps=steps).report
        return {
            "ours": found["headline"],
            "train_seconds": report["seconds"],
            "iterations": report["iterations"],
            "config": described(config),
            "evaluation": found,
        }

    def protocol(self, row: Row) -> dict[str, Any]:
        """The settings that are the row's own and the table's, as JSON has them."""
        evaluation = {**self.evaluation, **row.evaluation}
        return json.loads(
            json.dumps({"base": self.base, "row": row.config, "evaluation": evaluation, **self.more(row)})
        )

    def random(self, row: Row) -> bool:
        """Whether the numbers of a row depend on the seed."""
        return True

    def check_seed(self, rows: Sequence[Row], seed: int) -> None:
        """Refuse what is no seed, and a seed for rows that it would only measure again."""
        check_seed(seed)
        same = [row.name for row in rows if not self.random(row)] if seed else []
        if same:
            raise ConfigurationError(
                f"nothing is random in {', '.join(same)} of table {self.name!r}: --seed {seed} would give the same "
                "numbers again; leave --seed out, or name other rows"
            )

    def more(self, row: Row) -> dict[str, Any]:
        """What else decides the numbers of a row, in tables that do not say all of it in the row."""
        return {}

    def records(self, folder: Path) -> list[dict[str, Any]]:
        """What is finished, in the table's order, a row's seeds one after the other."""
        names = (name for row in self.rows for name in (f"{row.name}.json", f"{row.name}-seed*.json"))
        return [read_json(file) for name in names for file in sorted(folder.glob(name))]

    def write(self, folder: Path) -> Path:
        """`folder/NAME.md`: the table of what is finished."""
        path = folder / f"{self.name}.md"
        write_text(path, self.markdown(self.records(folder)))
        return path

    def heading(self, found: Sequence[Mapping[str, Any]]) -> list[str]:
        """Title and protocol, and whether the numbers are quick ones."""
        text = [f"# {self.title}", "", self.about, ""]
        if any(record["quick"] for record in found):
            text += ["**Made with `--quick`: these numbers show that it runs, and nothing else.**", ""]
        return text

    def markdown(self, found: Sequence[Mapping[str, Any]]) -> str:
        """The table as it stands: ours ± the 95 % interval (see `mean_of_seeds`), the paper's number in brackets."""
        shown = {record["row"] for record in found}
        rows = [row for row in self.rows if row.name in shown]
        columns = list(dict.fromkeys(row.column for row in rows))
        text = self.heading(found)
        text += ["| | " + " | ".join(columns) + " | inner steps | iterations, rate | training |"]
        text += ["|---" * (len(columns) + 4) + "|"]
        for line in dict.fromkeys(row.line for row in rows):
            own = [
                record for column in columns for record in found if (record["line"], record["column"]) == (line, column)
            ]
            cells = [_cell([r for r in own if r["column"] == column], self.percent) for column in columns]
            seconds = ", ".join(f"{r['train_seconds']:.0f} s" for r in own)
            steps = ", ".join(dict.fromkeys(str(r["ours"]["steps"]) for r in own))
            length = ", ".join(dict.fromkeys(_length(r) for r in own))
            text.append(f"| {line} | " + " | ".join(cells) + f" | {steps} | {length} | {seconds} |")
        notes = dict.fromkeys(f"{row.line}: {row.note}" for row in rows if row.note)
        sources = dict.fromkeys(row.source for row in rows if row.source)
        text += ["", *(f"* {note}" for note in [*notes, *note_on_seeds(found)])]
        if sources:
            text += [f"* Papers' numbers: {'; '.join(sources)}."]
        return "\n".join(text).rstrip() + "\n"

    def config(self, row: Row, *, seed: int, quick: bool) -> MetaLearningConfig:
        """The configuration that a row is trained by."""
        short = {"num_meta_iterations": QUICK_ITERATIONS, "meta_batch_size": 2} if quick else {}
        merged: dict[str, Any] = {}
        for layer in (self.base, row.config, {"meta_learning": {"seed": seed, **short}}):
            for section, values in layer.items():
                merged[section] = {**merged.get(section, {}), **values}
        if quick:
            merged["task_distribution"] |= {"num_val_tasks": 2, "num_test_tasks": 2}
        return MetaLearningConfig.from_dict(merged)


def trained(config: MetaLearningConfig, run: Run, name: str | None = None) -> dict[str, Any]:
    """The report of training by `config`, in a run folder of its own; one that was begun is gone on with.

    Args:
        config: without paths.
        run: of the row.
        name: of the run folder, where rows share what is trained; default: the row's.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    name = name or run.name
    found = sorted((run.folder / "runs").glob(f"{name}_*/config.json"))
    begun = [path for path in found if _settings_in(path) == described(config)]  # of other settings it is another run
    if begun:
        report = resume(begun[-1].parent, watch=run.watch)
    else:
        paths = {"output_dir": str(run.folder / "runs"), "checkpoint_dir": str(run.folder / "checkpoints" / name)}
        if run.data_dir is not None:
            paths["data_dir"] = str(run.data_dir)
        placed = config.model_copy(update={"paths": config.paths.model_copy(update=paths)})
        report = train(placed, name=name, watch=run.watch)
    if report["stopped"] == "interrupted":
        raise KeyboardInterrupt
    return report


def described(config: MetaLearningConfig) -> dict[str, Any]:
    """A configuration for a record: without the folders of the machine that it was used on."""
    return {section: values for section, values in config.to_dict().items() if section != "paths"}


def chosen(config: MetaLearningConfig) -> dict[str, Any]:
    """What of `described` differs from the defaults: an option that is added later changes no record's protocol."""
    defaults = described(MetaLearningConfig.from_dict({"model": {"backbone": config.model.backbone}}))
    del defaults["model"]["backbone"]  # whose defaults these are: always told
    return {
        section: differing
        for section, values in described(config).items()
        if (differing := {key: value for key, value in values.items() if value != defaults[section].get(key, _UNSET)})
    }


def _settings_in(path: Path) -> dict[str, Any] | None:
    try:
        return described(MetaLearningConfig.from_dict(read_json(path)))
    except ToolkitError:  # damaged, or of another version
        return None


def mean_of_seeds(results: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Mean over the records of one cell by seed, and the mean of their own half-widths, each over that seed's tasks.

    It says how sure one seed's number is; how far the seeds lie apart is no part of it.
    """
    widths = [result["ci95"] for result in results if result["ci95"] is not None]
    mean = sum(result["mean"] for result in results) / len(results)
    return mean, sum(widths) / len(widths) if widths else None


def note_on_seeds(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ± is where a cell is of several seeds; nothing where none is."""
    cells = [(record["line"], record["column"]) for record in found]
    several = len(set(cells)) < len(cells)
    return ["± is the mean of the seeds' own 95 % intervals over tasks where a cell is of several seeds."] * several


def _length(record: Mapping[str, Any]) -> str:
    return f"{record['iterations']:,} at {record['config']['meta_learning']['outer_lr']:g}"


def _cell(records: Sequence[Mapping[str, Any]], percent: bool) -> str:
    if not records:
        return ""
    if any(record["ours"]["mean"] is None for record in records):
        return "diverged"
    mean, ci95 = mean_of_seeds([record["ours"] for record in records])
    scale, digits = (100, 2) if percent else (1, 3 if mean >= 0.1 else 4)
    ours = f"**{scale * mean:.{digits}f}**" + ("" if ci95 is None else f" ± {scale * ci95:.{digits}f}")
    paper = records[0]["paper"]
    published = "" if paper is None else f" ({paper:.2f})" if percent else f" ({paper:g})"
    return ours + (f", {len(records)} seeds" if len(records) > 1 else "") + published

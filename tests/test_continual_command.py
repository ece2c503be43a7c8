"""`continual` and `melpa` at the command line: own files, and nothing taken in silence that is not heeded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from efficientai_toolkit.cli import app
from efficientai_toolkit.continual.streams import build_scenario, files
from efficientai_toolkit.errors import ConfigurationError, DataError, OutputError
from efficientai_toolkit.recipes.continual import plan_of
from efficientai_toolkit.runs.experiment import open_run


def save(path: Path, width: int = 4, seed: int = 0, **changed: np.ndarray) -> Path:
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 40), ("test", 20)):
        y = np.arange(n) % 2
        arrays |= {f"{part}_x": rng.normal(size=(n, width)) + y[:, None], f"{part}_y": y}
    np.savez(path, **{**arrays, **changed})
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with the contexts c0.npz and c1.npz."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        save(tmp_path / f"c{number}.npz", seed=number)
    return tmp_path


def told(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    return result.stderr


OWN = ("continual", "--file", "c0.npz", "--file", "c1.npz", "--strategies", "naive")


def test_a_run_folder_is_one_process_s_at_a_time(folder):
    run = folder / told(*OWN, "--quick")["run"]
    with open_run(run, "continual").alone():
        assert "another process is at work in" in refused("continual", "--resume", str(run))
    assert told("continual", "--resume", str(run))["run"]


def test_a_run_of_own_files_goes_on_from_another_folder(folder, monkeypatch):
    first = told(*OWN, "--quick")
    run = (folder / first["run"]).resolve()
    assert json.loads((run / "config.json").read_text())["contexts"] == 2  # as many as there are
    shown = CliRunner().invoke(app, ["continual", "--resume", str(run)])
    assert shown.stdout.startswith("own files, task-incremental ")
    (run / "results.json").unlink()
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    again = told("continual", "--resume", str(run))["summary"]["naive"]
    assert again["average_accuracy"] == first["summary"]["naive"]["average_accuracy"]


@pytest.mark.parametrize(
    "more",
    [("--seeds", "5"), ("--seed", "7"), ("-n", "99"), ("--output", "elsewhere"), ("--strategies", "si"), ("--quick",),
     ("--option", "si.si_c=3"), ("-s", "split-mnist/task"), ("--file", "c0.npz"), ("--hidden-dim", "8")],
)  # fmt: skip
def test_a_run_that_goes_on_takes_no_other_settings(folder, more):
    assert "cannot be given with --resume: a run keeps its settings" in refused("continual", "--resume", "RUN", *more)


@pytest.mark.parametrize("more", [("--quick",), ("--seed", "0"), ("--n_tasks", "2"), ("-o", "elsewhere")])
def test_neither_does_one_of_melpa(folder, more):
    assert "cannot be given with --resume" in refused("melpa", "--resume", "RUN", *more)


def test_a_stream_beside_own_files_is_refused(folder):
    assert "--scenario clinc150/class with --file" in refused(*OWN, "-s", "clinc150/class")
    assert "--scenario split-mnist/task with --file" in refused(*OWN, "-s", "split-mnist/task")
    assert not (folder / "experiments").exists()


def test_as_many_contexts_are_learned_as_the_plan_says(folder):
    paths = [str(folder / f"c{k}.npz") for k in range(2)]
    assert build_scenario(paths, contexts=1).names == ["c0"]
    with pytest.raises(ConfigurationError, match="files has 2 contexts, not 3"):
        build_scenario(paths, contexts=3)
    assert plan_of({"stream": paths, "strategies": {"naive": {}}, "quick": True}).contexts == 2
    assert plan_of({"stream": paths * 3, "strategies": {"naive": {}}, "quick": True}).contexts == 3
    assert "files has 2 contexts, not 30" in refused(*OWN, "--contexts", "30")
    assert not list((folder / "experiments").iterdir())


@pytest.mark.parametrize(
    ("stream", "contexts", "said"),
    [
        ("clinc150", 30, "clinc150 has 10 contexts, not 30"),
        ("split-omniglot", 60, "split-omniglot has 50 contexts, not 60"),
        ("split-mnist", 11, "there are 10 classes, not enough for 11 contexts"),
        ("banking77", 100, "there are 77 classes, not enough for 100 contexts"),
    ],
)
def test_a_stream_has_no_more_contexts_than_it_has(stream, contexts, said, data_dir):
    with pytest.raises(ConfigurationError, match=said):
        build_scenario(stream, data_dir=data_dir, contexts=contexts)


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    return path


def test_a_file_that_is_no_context_is_named(folder):
    good = folder / "c0.npz"
    np.save(folder / "x.npy", np.zeros((3, 4)))
    cut = folder / "cut.npz"
    cut.write_bytes(good.read_bytes()[:-200])
    bad = [
        (folder / "x.npy", "is one array"),
        (cut, "is no .npz of plain arrays"),
        (flipped(save(folder / "flipped.npz")), "is no .npz of plain arrays"),
        (save(folder / "text.npz", train_x=np.array(["a"] * 40), test_x=np.array(["b"] * 20)), "must be numbers"),
        (save(folder / "wide.npz", width=7), r"are \(4,\), of .*wide.npz \(7,\)"),
    ]
    for path, said in bad:
        with pytest.raises(DataError, match=said) as raised:
            files([good, path])
        assert str(path) in str(raised.value)


def test_results_that_cannot_be_linked_are_still_told(folder, monkeypatch):
    def link(*paths: object) -> bool:
        raise OutputError("cannot write results")

    def run_folder(config, manager, **options):
        return {"summary": {}}, manager.path / "results.md"

    monkeypatch.setattr("efficientai_toolkit.files.link", link)
    monkeypatch.setattr("efficientai_toolkit.recipes.melpa.run_folder", run_folder)
    result = CliRunner().invoke(app, ["melpa", "--quick"])
    assert result.exit_code == 0
    assert "Warning: no link to them: cannot write results" in result.stderr
    assert f"Report: {Path('experiments')}{os.sep}" in result.stdout

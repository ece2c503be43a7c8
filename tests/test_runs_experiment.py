"""The run folder: unique, crash-proof, and honest about what is not finite."""

from __future__ import annotations

import json
import os
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.errors import CheckpointNotFoundError, ConfigurationError, DataError, OutputError
from efficientai_toolkit.files import jsonable, read_json, write_json
from efficientai_toolkit.runs import experiment
from efficientai_toolkit.runs.build import checkpoint_file
from efficientai_toolkit.runs.experiment import ExperimentManager
from efficientai_toolkit.runs.train import resume

CONFIG = {
    "meta_learning": {"algorithm": "maml", "seed": 0},
    "task_distribution": {"task_families": ["sinusoid"]},
}


def test_folder_is_named_after_algorithm_and_family(tmp_path):
    run = ExperimentManager(tmp_path, config=CONFIG)
    assert run.path.parent == tmp_path
    assert run.path.name.startswith("MAML_Sinusoid_2")
    assert read_json(run.path / "config.json") == CONFIG
    for folder in (run.checkpoints, run.plots, run.tensorboard):
        assert folder.is_dir()
    system = read_json(run.path / "system.json")
    assert system["seed"] == 0  # seed 0 is a seed
    assert system["versions"]["mlx"]
    assert {"os", "python", "git_commit", "device"} <= set(system)


def test_git_is_asked_only_within_a_repository(tmp_path, monkeypatch):
    """On a Mac without the command line tools, `git` asks the user to install them."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "abc\n")

    monkeypatch.setattr(experiment.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    assert experiment._git_commit() is None
    assert not asked
    (tmp_path / "in" / "it").mkdir(parents=True)
    (tmp_path / ".git").touch()  # of a worktree, a file
    monkeypatch.chdir(tmp_path / "in" / "it")
    assert experiment._git_commit() == "abc"


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        (["linear_classification"], "Reptile_Linear"),
        (["linear_classification", "nonlinear_classification"], "Reptile_LinearNonlinear"),
        (["sinusoid", "harmonic", "omniglot"], "Reptile_Mixed"),
    ],
)
def test_default_names(tmp_path, families, expected):
    config = {"meta_learning": {"algorithm": "reptile"}, "task_distribution": {"task_families": families}}
    assert ExperimentManager(tmp_path, config=config).name == expected


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    runs = [ExperimentManager(tmp_path, "same", {}) for _ in range(4)]
    assert len({run.path for run in runs}) == 4


def test_a_row_is_on_disk_when_log_returns(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    run.log({"iteration": 1, "loss": mx.array(0.5), "grad": np.float32("nan")})
    assert (run.path / "metrics.jsonl").read_text() == '{"iteration": 1, "loss": 0.5, "grad": null}\n'


def test_open_drops_rows_later_than_the_checkpoint(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    for iteration in range(5):
        run.log({"iteration": iteration, "loss": iteration / 2})
    resumed = ExperimentManager.open(run.path, iteration=2)
    assert [row["iteration"] for row in resumed.rows()] == [0, 1, 2]
    resumed.log({"iteration": 3, "loss": 9.0})
    assert [row["loss"] for row in resumed.rows()] == [0, 0.5, 1, 9]
    assert resumed.name == "r"


def test_a_row_cut_short_by_a_crash_is_dropped(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    run.log({"iteration": 0, "loss": 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"iteration": 1, "lo')
    again = ExperimentManager.open(run.path)
    assert [row["iteration"] for row in again.rows()] == [0]
    again.log({"iteration": 1, "loss": 2.0})
    assert [row["loss"] for row in again.rows()] == [1.0, 2.0]


def test_a_damaged_row_elsewhere_is_named(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    run.metrics_path.write_text('{"iteration": 0}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        run.rows()


def test_finish_writes_columns_and_report(tmp_path):
    run = ExperimentManager(tmp_path, "r", CONFIG)
    run.log({"iteration": 0, "loss": 2.0, "note": "text"})
    run.log({"iteration": 10, "loss": 1.0, "val_loss": float("inf")})
    run.finish({"test": {"step_1_loss": float("nan")}})
    metrics = read_json(run.path / "metrics.json")
    assert metrics["history"] == {"loss": {"iteration": [0, 10], "value": [2.0, 1.0]}}
    assert metrics["last"]["val_loss"] is None
    report = read_json(run.path / "full_report.json")
    assert report["config"] == CONFIG
    assert report["test"]["step_1_loss"] is None


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="not a run folder"):
        ExperimentManager.open(tmp_path)


def test_a_run_is_one_process_s_at_a_time(tmp_path):
    run = ExperimentManager(tmp_path, "r", {"meta_learning": {"seed": 0}})
    with run.alone(), pytest.raises(ConfigurationError, match=r"another process is at work in .*; wait until"):
        resume(run.path)
    with run.alone() as same:  # which ends with the block
        assert same is run


def test_the_working_directory_has_a_name(tmp_path, monkeypatch):
    run = ExperimentManager(tmp_path, "r", {})
    monkeypatch.chdir(run.path)
    for here in (".", "checkpoints/.."):
        found = ExperimentManager.open(here)
        assert (found.name, found.path.name) == ("r", run.path.name)


def test_seeds_of_an_experiment_are_noted(tmp_path):
    assert ExperimentManager(tmp_path, "r", {"seeds": [3, 4]}).system["seed"] == [3, 4]
    assert ExperimentManager(tmp_path, "r", {"meta_learning": {"seed": 0}}).system["seed"] == 0


def test_a_name_that_is_too_long_is_at_fault(tmp_path):
    with pytest.raises(OutputError, match="File name too long; give a shorter name"):
        ExperimentManager(tmp_path, "n" * 300, {})


@pytest.mark.parametrize(
    ("results", "said"), [(False, "`continual --resume RUN` goes on"), (True, "`report RUN` tells")]
)
def test_a_run_without_a_learner_says_what_reads_it(tmp_path, results, said):
    run = ExperimentManager(tmp_path, "r", {"strategies": {}})
    if results:
        (run.path / "results.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match=said.replace("RUN", str(run.path))):
        checkpoint_file(run.path)


def test_damaged_config_is_named(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    (run.path / "config.json").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        ExperimentManager.open(run.path)


def test_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*file: .*can be written"):
        ExperimentManager(tmp_path / "file", "r", {})


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_jsonable_covers_what_metrics_are_made_of(tmp_path):
    value = {"a": mx.array([1.0, float("inf")]), "b": np.int64(3), 4: (True, None), "p": tmp_path, "x": {1.5}}
    assert jsonable(value) == {"a": [1.0, None], "b": 3, "4": [True, None], "p": str(tmp_path), "x": [1.5]}

"""A run that is stopped at any moment and resumed ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efficientai_toolkit.checkpoint import read_npz, write_npz
from efficientai_toolkit.config import MetaLearningConfig, Override
from efficientai_toolkit.errors import ConfigurationError, DivergenceError
from efficientai_toolkit.runs import train as loop
from efficientai_toolkit.runs.train import Watch, resume, train

TIMES = ("seconds", "tasks_per_second")
# Intervals that do not divide one another: a checkpoint then falls between two rows.
SETTINGS = {
    "meta_learning": {
        "algorithm": "reptile",
        "num_meta_iterations": 30,
        "meta_batch_size": 3,
        "num_inner_steps": 2,
        "eval_interval": 10,
        "save_interval": 7,
        "seed": 3,
    },
    "learner": {"inner_batch_size": 4},
    "task_distribution": {"num_train_tasks": 9, "num_val_tasks": 4, "num_test_tasks": 2, "query_size": 10},
    "model": {"hidden_dim": 8},
    "logging": {"log_interval": 4, "tensorboard_enabled": False},
}


def configured(folder: Path, **meta) -> MetaLearningConfig:
    paths = {"output_dir": str(folder / "runs"), "checkpoint_dir": str(folder / "latest")}
    return MetaLearningConfig(**{**SETTINGS, "meta_learning": {**SETTINGS["meta_learning"], **meta}, "paths": paths})


def rows(run: str | Path) -> list[dict]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def content(path: Path) -> tuple[dict, dict]:
    arrays, header = read_npz(path)
    header["training"].pop("seconds")
    header["learner"].pop("task_bytes")  # a measurement
    header.pop("config")
    return {name: (a.dtype, a.shape, np.array(a).tobytes()) for name, a in arrays.items()}, header


def assert_same_run(one: str | Path, other: str | Path) -> None:
    assert rows(one) == rows(other)
    files = [sorted(path.name for path in (Path(run) / "checkpoints").iterdir()) for run in (one, other)]
    assert files[0] == files[1]
    for name in files[0]:
        assert content(Path(one) / "checkpoints" / name) == content(Path(other) / "checkpoints" / name), name


class Raising(Watch):
    """Raises, or does `act`, once a row or step of this number comes by."""

    def __init__(self, *, row: int | None = None, step: int | None = None, act=None):
        self.at_row, self.at_step, self.act, self.count = row, step, act, 0

    def row(self, row):
        self.count += 1
        if self.count == self.at_row:
            raise Crash

    def step(self, iteration, latest):
        if iteration == self.at_step:
            if self.act is None:
                raise Crash
            self.act()


class Crash(BaseException):
    """The process is gone."""


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The run that nothing interrupts."""
    return train(configured(tmp_path_factory.mktemp("whole")))["run"]


def test_the_uninterrupted_run_is_what_it_should_be(whole):
    report = json.loads((Path(whole) / "full_report.json").read_text())
    assert (report["stopped"], report["iterations"]) == ("completed", 30)
    names = {path.stem for path in (Path(whole) / "checkpoints").iterdir()}
    assert names == {"best", "last", "iter_7", "iter_14", "iter_21", "iter_28"}
    iterations = [row["iteration"] for row in rows(whole)]
    assert iterations == [0, 4, 8, 10, 12, 16, 20, 20, 24, 28, 30, 30]
    validations = [row for row in rows(whole) if "val_loss" in row and row["iteration"]]
    assert report["best"]["val_accuracy"] == max(row["val_accuracy"] for row in validations)
    losses = [row["query_loss"] for row in rows(whole) if "query_loss" in row]
    assert len(losses) == 8
    assert len(set(losses)) == 8


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
    assert_same_run(whole, train(configured(tmp_path))["run"])


def test_another_seed_gives_another_run(whole, tmp_path):
    assert rows(whole) != rows(train(configured(tmp_path, seed=4))["run"])


@pytest.mark.parametrize("step", [1, 7, 8, 10, 19, 29])
def test_a_crash_at_a_step(whole, tmp_path, step):
    with pytest.raises(Crash):
        train(configured(tmp_path), watch=Raising(step=step))
    assert_same_run(whole, resume(only_run(tmp_path))["run"])


@pytest.mark.parametrize("row", [1, 2, 4, 7, 8, 12])
def test_a_crash_after_a_row(whole, tmp_path, row):
    with pytest.raises(Crash):
        train(configured(tmp_path), watch=Raising(row=row))
    assert_same_run(whole, resume(only_run(tmp_path))["run"])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 12))
def test_a_crash_around_a_checkpoint(whole, tmp_path, monkeypatch, number, before):
    """Between any two files of one iteration, the files disagree; the resumed run mends that."""
    count = 0

    def crashing(*args):
        nonlocal count
        count += 1
        if before and count == number:
            raise Crash
        write_npz(*args)
        if count == number:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_npz", crashing)
        with pytest.raises(Crash):
            train(configured(tmp_path))
    report = resume(only_run(tmp_path))
    assert_same_run(whole, report["run"])
    assert content(Path(report["latest_best"])) == content(Path(report["checkpoints"]["best"]))


def test_the_start_is_measured_but_changes_nothing_and_is_never_the_best(whole, tmp_path, monkeypatch):
    whole_validation = loop._Loop._validate
    monkeypatch.setattr(loop._Loop, "_validate", lambda self: self.learner.iteration and whole_validation(self))
    without = train(configured(tmp_path))["run"]
    assert rows(without) == rows(whole)[1:]
    for path in (Path(without) / "checkpoints").iterdir():
        assert content(path)[0] == content(Path(whole) / "checkpoints" / path.name)[0]
    monkeypatch.undo()
    monkeypatch.setattr(loop, "_score", lambda row: (0.0, 0.0) if row is None else (1.0 / (1 + row["iteration"]), 0.0))
    assert train(configured(tmp_path / "falling"))["best"]["iteration"] == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_ctrl_c_finishes_the_step_and_saves(whole, tmp_path, number):
    watch = Raising(step=17, act=lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    report = train(configured(tmp_path), watch=watch)
    assert signal.getsignal(number) is handler
    assert (report["stopped"], report["iterations"]) == ("interrupted", 17)
    assert read_npz(report["checkpoints"]["last"])[1]["learner"]["iteration"] == 17
    report = resume(report["run"])
    assert (report["stopped"], report["iterations"]) == ("completed", 30)
    assert_same_run(whole, report["run"])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nohup_stays(tmp_path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        report = train(configured(tmp_path), watch=Raising(step=17, act=lambda: signal.raise_signal(signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert report["stopped"] == "completed"


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(configured(tmp_path), watch=Raising(step=3, act=twice))


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path):
    with pytest.raises(Crash):
        train(configured(tmp_path), watch=Raising(step=25))
    run, said = only_run(tmp_path), []
    for name in ("last", "iter_21"):
        path = run / "checkpoints" / f"{name}.npz"
        path.write_bytes(path.read_bytes()[:-100])
    (run / "checkpoints" / ".best.npz.a1b2").write_bytes(b"the half of a file that a kill left")
    watch = Watch()
    watch.say = said.append
    resume(run, watch=watch)
    assert sum("passed over" in text for text in said) == 2
    assert_same_run(whole, run)


def test_a_complete_run_has_nothing_left_to_do_and_can_be_made_longer(tmp_path):
    short = train(configured(tmp_path / "short", num_meta_iterations=10))
    before = rows(short["run"])
    assert resume(short["run"])["iterations"] == 10
    assert rows(short["run"]) == before
    with pytest.raises(ConfigurationError, match="has done 10 iterations already, and 5 are asked for"):
        resume(short["run"], [Override("meta_learning.num_meta_iterations", 5, "--iterations 5")])
    with pytest.raises(ConfigurationError, match="goes on with its own seed"):
        resume(short["run"], [Override("meta_learning.seed", 5, "--set")])
    longer = resume(short["run"], [Override("meta_learning.num_meta_iterations", 30, "--iterations 30")])
    whole = train(configured(tmp_path / "long"))
    arrays = [content(Path(report["checkpoints"]["last"]))[0] for report in (longer, whole)]
    assert arrays[0] == arrays[1]


def test_patience_stops_and_a_resumed_run_stops_there_too(tmp_path):
    report = train(configured(tmp_path, outer_lr=1e-9, eval_interval=2, patience=3, num_meta_iterations=60))
    assert report["stopped"] == "patience"
    assert report["iterations"] == report["best"]["iteration"] + 6
    assert resume(report["run"])["iterations"] == report["iterations"]


def test_target_accuracy_stops(tmp_path):
    report = train(configured(tmp_path, target_accuracy=0.3))
    assert (report["stopped"], report["iterations"]) == ("target_accuracy", 10)
    assert report["best"]["val_accuracy"] >= 0.3


def test_divergence_names_the_iteration_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    """The iteration is exact although numbers are looked at only every few steps."""
    from efficientai_toolkit.learners.base import MetaLearner

    whole = MetaLearner.meta_update

    def breaking(self, stacks, loss_fn=None, **options):
        metrics = whole(self, stacks, loss_fn, **options)
        return {**metrics, "grad_norm": metrics["grad_norm"] + float("inf")} if self.iteration == 18 else metrics

    monkeypatch.setattr(MetaLearner, "meta_update", breaking)
    with pytest.raises(DivergenceError, match=r"grad_norm became infinite at iteration 18;.*\(iteration 16\)"):
        train(configured(tmp_path))
    arrays, header = read_npz(only_run(tmp_path) / "checkpoints" / "last.npz")
    assert header["learner"]["iteration"] == 16
    assert all(np.isfinite(np.array(a)).all() for name, a in arrays.items() if name.startswith("model/"))
    monkeypatch.undo()
    assert resume(only_run(tmp_path))["iterations"] == 30


def test_the_newest_best_has_no_evaluation_of_the_one_before(tmp_path):
    run = train(configured(tmp_path))["run"]
    latest, told = tmp_path / "latest" / "best.npz", tmp_path / "latest" / "best.evaluation_steps=0.json"
    told.write_text("{}")
    resume(run)  # which changes nothing
    assert told.is_file()
    train(configured(tmp_path, seed=4))
    assert not told.exists()
    told.write_text("{}")
    resume(run)
    assert read_npz(latest)[1]["config"]["meta_learning"]["seed"] == 3
    assert not told.exists()


def test_one_validation_task_has_no_interval(tmp_path):
    config = configured(tmp_path, num_meta_iterations=0)
    config.task_distribution.num_val_tasks = 1
    (row,) = rows(train(config)["run"])
    assert row["val_loss"] > 0
    assert row["val_loss_ci95"] is None


def test_no_iterations_still_gives_a_checkpoint(tmp_path, monkeypatch):
    report = train(configured(tmp_path, num_meta_iterations=0))
    assert report["iterations"] == 0
    assert Path(report["latest_best"]).is_file()
    assert [row["iteration"] for row in rows(resume(report["run"])["run"])] == [0]
    monkeypatch.setattr(loop, "_score", lambda row: -row["iteration"] if row else -math.inf)  # the start is best
    longer = resume(report["run"], [Override("meta_learning.num_meta_iterations", 10, "test")])
    assert longer["best"]["iteration"] == 10


@pytest.mark.slow
def test_kill_9_several_times(tmp_path):
    """A real process, killed by SIGKILL at moments of chance, against one that is left alone."""
    settings = {"num_meta_iterations": 300, "save_interval": 11, "eval_interval": 20}
    whole = train(configured(tmp_path / "whole", **settings))["run"]
    (tmp_path / "c.json").write_text(json.dumps(configured(tmp_path / "killed", **settings).to_dict()))
    command = [sys.executable, "-m", "efficientai_toolkit", "meta-learning-peft:train", "--no-report"]
    rng, kills, run = random.Random(0), 0, None
    while True:
        given = ["--config", str(tmp_path / "c.json")] if run is None else ["--resume", str(run)]
        process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        had = 0 if run is None else len(rows_read(run))
        wait_for_rows(process, tmp_path / "killed", had + rng.randint(5, 25) if kills < 4 else 10**9)
        if process.poll() is None:
            time.sleep(rng.random() * 0.02)
            process.kill()
            kills += 1
        said = process.communicate()[0].decode()
        assert process.returncode in (0, -signal.SIGKILL), said
        run = only_run(tmp_path / "killed")
        if process.returncode == 0:
            break
    assert kills >= 3
    assert_same_run(whole, run)


def rows_read(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def wait_for_rows(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Until the run has logged `count` rows or is over."""
    while process.poll() is None:
        found = list((folder / "runs").glob("*/metrics.jsonl"))
        if found and len(found[0].read_bytes().splitlines()) >= count:
            return
        time.sleep(0.002)


def test_a_run_that_is_being_trained_is_not_resumed(tmp_path):
    refused = []

    class Resuming(Watch):
        def begin(self, run, first, total, tasks):
            with pytest.raises(ConfigurationError, match="another process is at work in"):
                resume(run)
            refused.append(run)

    train(configured(tmp_path, num_meta_iterations=2), watch=Resuming())
    assert len(refused) == 1

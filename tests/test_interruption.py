"""How a command ends that is not left to end by itself: readers that go away, Ctrl-C, no memory, a full disk."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from efficientai_toolkit.cli import _reported, app
from efficientai_toolkit.cli.progress import validation
from efficientai_toolkit.cli.shown import command
from efficientai_toolkit.cli.stdio import Unstoppable
from efficientai_toolkit.continual import STRATEGIES
from efficientai_toolkit.continual.run import Plan
from efficientai_toolkit.errors import ConfigurationError, DivergenceError, OutputError
from efficientai_toolkit.recipes.melpa import MeLPAConfig
from efficientai_toolkit.runs.experiment import ExperimentManager

ROOT = Path(__file__).parents[1]
QUICK = ["--config", str(ROOT / "configs" / "quick.yaml"), "--set", "logging.tensorboard_enabled=false", "-n", "6"]


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """Run a command in an empty folder whose name has a space."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments, code: int):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_a_command_line_survives_a_shell():
    line = command("adapt", "my row", base_name="it's", steps=0, json=True, quick=False, seed=None)
    words = [
        "efficientai-toolkit",
        "meta-learning-peft:adapt",
        "my row",
        "--base-name",
        "it's",
        "--steps",
        "0",
        "--json",
    ]
    assert shlex.split(line) == words


@pytest.mark.parametrize("json", [False, True])
def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path, json):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "efficientai_toolkit", "train", *QUICK, "--no-report", *["--json"] * json]
    try:
        assert subprocess.run(words, stdout=write, stderr=write, cwd=tmp_path, check=False).returncode == 0
    finally:
        os.close(write)
    assert len(list((tmp_path / "experiments").glob("*/checkpoints/last.npz"))) == 1


def test_what_is_written_to_a_closed_terminal_is_dropped():
    pty = pytest.importorskip("pty")
    main, child = pty.openpty()
    with Unstoppable(child, "wb") as terminal:
        assert terminal.write(b"seen") == 4
        os.close(main)
        assert terminal.write(b"unseen") == 6


def test_another_fault_of_a_stream_is_told(tmp_path):
    (tmp_path / "file").touch()
    with Unstoppable(os.open(tmp_path / "file", os.O_RDONLY), "wb") as closed, pytest.raises(OSError):
        closed.write(b"x")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError("Unable to allocate 37.3 GiB."), 2, "out of memory (Unable to allocate 37.3 GiB); take fewer"),
        (RuntimeError("[malloc] Unable to allocate 123 bytes."), 2, "out of memory ([malloc] Unable to allocate 123"),
        (RuntimeError("[METAL] failed: Insufficient Memory (00000008:kIOGPUErrorOutOfMemory)"), 2, "out of memory ("),
        (ConfigurationError("no such thing"), 2, "Error: no such thing"),
        (DivergenceError("the loss became nan"), 3, "Error: the loss became nan"),
    ],
)
def test_what_went_wrong_is_a_sentence_and_an_exit_code(capsys, error, code, said):
    def fails():
        raise error

    with pytest.raises(SystemExit) as ended:
        _reported(fails)()
    assert ended.value.code == code
    (sentence,) = capsys.readouterr().err.splitlines()
    assert said in sentence


def test_ctrl_c_within_the_import_of_an_extension_is_ctrl_c(capsys):
    def importing():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("Encountered an error while initializing the extension.") from error

    with pytest.raises(SystemExit) as ended:
        _reported(importing)()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"

    def missing():
        raise ImportError("no such module")

    with pytest.raises(ImportError, match="no such module"):
        _reported(missing)()


def test_a_fault_of_this_package_is_not_taken_for_lack_of_memory():
    def fails():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _reported(fails)()


def test_a_full_disk_says_how_to_go_on(ended, monkeypatch):
    from efficientai_toolkit import files

    replace = os.replace

    def full(source, target):
        if Path(target).name == "last.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    sentence = ended("train", *QUICK, "--no-report", "--output", "my runs", code=2).stderr
    assert "free some space, then go on with `" in sentence
    assert "name a folder" not in sentence
    words = shlex.split(sentence.split("`")[1])
    assert words[:3] == ["efficientai-toolkit", "meta-learning-peft:train", "--resume"]
    assert words[3].startswith("my runs/")


def test_a_report_that_cannot_be_written_is_a_warning(ended, monkeypatch):
    from efficientai_toolkit.runs import report

    def full(*arguments, **options):
        raise OutputError("cannot write plots/a.png: No space left on device; free some space")

    monkeypatch.setattr(report, "write_report", full)
    done = ended("train", *QUICK, "-o", "my runs", code=0)
    assert "Evaluate:" in done.stdout
    assert "Warning: no report: cannot write plots/a.png" in done.stderr
    again = shlex.split(done.stderr.strip().partition("later: ")[2])
    assert again[1] == "meta-learning-peft:report"
    assert Path(again[2], "checkpoints", "last.npz").is_file()


@pytest.mark.parametrize("name", ["../out", "a\\b", "/tmp/x"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ConfigurationError, match="without / or"):
        ExperimentManager(tmp_path / "runs", name)
    assert not list(tmp_path.iterdir())


def test_only_a_run_folder_without_results_is_discarded(tmp_path):
    run = ExperimentManager(tmp_path, "a")
    run.log({"iteration": 1})
    run.discard()
    assert run.metrics_path.is_file()
    run.metrics_path.unlink()
    run.discard()
    assert not run.path.exists()


@pytest.mark.parametrize("scenario", ["split-mnst", "split-cifar100"])
def test_a_stream_that_is_not_there_leaves_no_run_folder(ended, scenario):
    ended("continual", "--scenario", scenario, "--data-dir", ".", code=2)
    assert not list(Path().glob("experiments/*"))


@pytest.mark.parametrize(("name", "target"), [("continual", "continual.experiment"), ("melpa", "melpa.run_folder")])
def test_an_interrupted_experiment_says_how_to_go_on(ended, monkeypatch, name, target):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"efficientai_toolkit.recipes.{target}", interrupt)
    *_, line = ended(name, "--quick", "-o", "my runs", code=130).stderr.splitlines()
    words = shlex.split(line)
    assert words[1:3] == [f"meta-learning-peft:{name}", "--resume"]
    assert Path(words[3], "config.json").is_file()


def test_an_interrupted_table_goes_on_by_the_same_command(ended, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("efficientai_toolkit.recipes.reproduce.table.Table.run", interrupt)
    asked = ["reproduce", "sinusoid", "maml-*", "--quick", "--output", "my runs"]
    *_, line = ended(*asked, code=130).stderr.splitlines()
    assert shlex.split(line)[1:] == ["meta-learning-peft:reproduce", *asked[1:]]


def test_a_learner_without_steps_has_nothing_before_them():
    row = {"val_loss": 1.672, "val_loss_ci95": 0.81, "val_loss_before": 1.6720001, "val_accuracy": 0.74}
    assert validation(row) == "validation: loss 1.67 ± 0.81, accuracy 74.0 %"
    row |= {"val_loss_before": 2.0, "val_accuracy_ci95": 0.08, "val_accuracy_before": 0.453}
    assert validation(row) == (
        "validation: loss 1.67 ± 0.81 (2 before adaptation), accuracy 74.0 % ± 8.0 (45.3 % before adaptation)"
    )


def test_helps_state_the_defaults_that_are():
    plan, melpa = Plan(), MeLPAConfig()
    told = {
        "continual": [
            f"else {plan.iterations})", f"else {plan.batch_size})", f"else {plan.learning_rate})",
            f"else {plan.hidden_dim})", *STRATEGIES,
        ],
        "melpa": [
            f"{melpa.model_name})", f"{melpa.adapter_type})", f"{melpa.bottleneck_dim})", f"{melpa.lora_rank})",
            f"{melpa.n_meta_epochs})", f"{melpa.n_tasks})", f"{melpa.n_epochs_per_task})",
        ],
    }  # fmt: skip
    for name, defaults in told.items():
        text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).stdout
        assert not [default for default in defaults if default not in text]

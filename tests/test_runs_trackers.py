"""Trackers: what is logged arrives, and nothing heavy is imported before it must."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest

from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ConfigurationError
from efficientai_toolkit.runs.experiment import ExperimentManager
from efficientai_toolkit.runs.trackers import TensorBoard, open_trackers, scalars


def events(folder):
    """(tag, step, value) of every scalar in the folder's event files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its CRC (4), the event, its CRC (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_gets_every_number(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    board = TensorBoard(run)
    board.log({"iteration": 10, "query_loss": 0.5, "grad_norm": float("nan"), "note": "text"})
    board.log({"iteration": 20, "val_loss": 0.25})
    board.close()
    assert events(run.tensorboard) == [("train/query_loss", 10, 0.5), ("val/loss", 20, 0.25)]


def test_tensorboard_is_imported_only_when_it_writes(tmp_path):
    code = f"""
import sys
from efficientai_toolkit.runs.experiment import ExperimentManager
from efficientai_toolkit.runs.trackers import TensorBoard
board = TensorBoard(ExperimentManager({str(tmp_path)!r}, "r", {{}}))
board.log({{"iteration": 1, "loss": 1.0}})
assert "tensorboardX" not in sys.modules
board.close()
assert "tensorboardX" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configuration_says_which_are_open(tmp_path):
    run = ExperimentManager(tmp_path, "r", {})
    config = MetaLearningConfig(logging={"tensorboard_enabled": False})
    assert open_trackers(config.logging, run) == []
    config.logging.tensorboard_enabled = True
    (board,) = open_trackers(config.logging, run)
    board.close()
    assert not list(run.tensorboard.iterdir())  # nothing logged, nothing written


def test_wandb_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    config = MetaLearningConfig(logging={"wandb_enabled": True, "tensorboard_enabled": False})
    with pytest.raises(ConfigurationError, match=r"efficientai-toolkit\[wandb\]"):
        open_trackers(config.logging, ExperimentManager(tmp_path, "r", {}))


def test_scalars_keeps_numbers_only():
    row = {"iteration": 3, "loss": 1, "val_accuracy": 0.5, "ok": True, "bad": float("inf"), "s": "x"}
    assert scalars(row) == {"train/loss": 1.0, "val/accuracy": 0.5}

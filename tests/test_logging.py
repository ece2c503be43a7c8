"""`setup_logger`: each line once, where it was asked for."""

from __future__ import annotations

import pytest

from efficientai_toolkit import setup_logger
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.errors import ConfigurationError, DivergenceError, OutputError
from efficientai_toolkit.runs.train import train


def test_each_line_once_on_stderr_and_in_the_file(tmp_path, capsys):
    for _ in range(2):
        logger = setup_logger("mine", tmp_path / "logs", "info")
    logger.info("seen")
    logger.debug("not seen")
    text = (tmp_path / "logs" / "mine.log").read_text()
    assert text.count("INFO mine: seen") == 1
    assert "not seen" not in text
    assert capsys.readouterr().err.count("INFO mine: seen") == 1
    setup_logger("mine", console=False)  # closes the file
    logger.info("unseen")
    assert "unseen" not in capsys.readouterr().err


def test_what_can_be_wrong(tmp_path):
    with pytest.raises(ConfigurationError, match="'LOUD'"):
        setup_logger("mine", level="LOUD")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="log_dir"):
        setup_logger("mine", tmp_path / "file")


def test_a_run_logs_to_its_folder(tmp_path):
    def config(**meta):
        return MetaLearningConfig(
            num_meta_iterations=4,
            **meta,
            model={"hidden_dim": 4},
            logging={"log_dir": str(tmp_path / "logs"), "log_interval": 2, "tensorboard_enabled": False},
            paths={"output_dir": str(tmp_path / "runs"), "checkpoint_dir": str(tmp_path / "latest")},
        )

    train(config())
    text = (tmp_path / "logs" / "efficientai_toolkit.log").read_text()
    assert "val_loss" in text
    assert "completed after 4 iterations" in text
    with pytest.raises(DivergenceError):
        train(config(inner_lr=1e12))
    assert "ERROR" in (tmp_path / "logs" / "efficientai_toolkit.log").read_text()
    setup_logger(console=False)

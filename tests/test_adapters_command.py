"""`adapters`: what each method would cost on a language model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from efficientai_toolkit.cli import app
from lm_folders import write_lm


def test_our_own_head_is_no_place_for_an_adapter(tmp_path):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra `lm`)")
    folder = write_lm(tmp_path / "llama", "llama")
    done = CliRunner().invoke(app, ["adapters", "--model", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in json.loads(done.stdout)["adapters"]}
    assert rows["bitfit"]["parameters"] is None  # Llama has no biases, and `finetune` trains the head's besides
    assert "no module matches 'bias'" in rows["bitfit"]["note"]
    assert rows["lora"]["parameters"] > 0

"""Tables of papers: rows resume, records stay, quick ones say so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from efficientai_toolkit import ConfigurationError
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.recipes.reproduce import load_table
from efficientai_toolkit.recipes.reproduce.table import chosen
from efficientai_toolkit.runs.train import Watch


@pytest.mark.parametrize("name", ["omniglot", "sinusoid"])
def test_every_row_is_a_configuration(name):
    table = load_table(name)
    names = [row.name for row in table.rows]
    assert len(names) == len(set(names)) >= 16
    for row in table.rows:
        config = table.config(row, seed=3, quick=False)
        assert config.algorithm in LEARNERS
        assert config.seed == 3
    with pytest.raises(ConfigurationError, match="maml"):
        table.chosen(["mamml"])
    with pytest.raises(ConfigurationError, match="sinusoid"):
        load_table("sinusoids")


class Stop(Watch):
    """Interrupts a run as Ctrl-C would."""

    def step(self, iteration, latest):
        if iteration == 7:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_row_ends_where_the_uninterrupted_one_does(tmp_path):
    table = load_table("sinusoid")
    (row,) = table.chosen(["meta_sgd-5"])
    with pytest.raises(KeyboardInterrupt):
        table.run(row, tmp_path / "stopped", quick=True, watch=Stop())
    assert not (tmp_path / "stopped" / "meta_sgd-5.json").exists()
    resumed = table.run(row, tmp_path / "stopped", quick=True)
    whole = table.run(row, tmp_path / "whole", quick=True)
    assert resumed["ours"] == whole["ours"]
    assert resumed["evaluation"]["metrics"] == whole["evaluation"]["metrics"]
    assert len(list((tmp_path / "stopped" / "runs").iterdir())) == 1
    assert table.run(row, tmp_path / "whole", quick=True) == whole  # a finished row is not run again


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    table = load_table("sinusoid")
    (row,) = table.chosen(["maml-5"])
    with pytest.raises(KeyboardInterrupt):
        table.run(row, tmp_path, quick=True, watch=Stop())
    config = {**row.config, "meta_learning": {**row.config["meta_learning"], "inner_lr": 0.02}}
    record = table.run(dataclasses.replace(row, config=config), tmp_path, quick=True)
    assert record["config"]["meta_learning"]["inner_lr"] == 0.02
    rates = [json.loads(path.read_text())["meta_learning"]["inner_lr"] for path in tmp_path.glob("runs/*/config.json")]
    assert sorted(rates) == [0.01, 0.02]


def test_a_record_of_other_settings_is_made_anew(tmp_path):
    table = load_table("sinusoid")
    (row,) = table.chosen(["maml-5"])
    first = table.run(row, tmp_path, quick=True)
    config = {**row.config, "meta_learning": {**row.config["meta_learning"], "inner_lr": 0.02}}
    other = table.run(dataclasses.replace(row, config=config), tmp_path, quick=True)
    assert other["config"]["meta_learning"]["inner_lr"] == 0.02
    assert other["ours"] != first["ours"]
    assert table.run(row, tmp_path, quick=True)["ours"] == first["ours"]


def test_a_quick_record_never_replaces_a_full_one(tmp_path):
    table = load_table("sinusoid")
    (row,) = table.chosen(["maml-5"])
    record = table.run(row, tmp_path, quick=True)
    (tmp_path / "maml-5.json").write_text(json.dumps({**record, "quick": False}))
    assert table.run(row, tmp_path, quick=True)["quick"] is False


@pytest.mark.parametrize("name", ["continual", "glue", "intents", "omniglot", "sinusoid"])
def test_the_protocol_of_every_row_is_json(name):
    table = load_table(name)
    for row in table.rows:
        protocol = table.protocol(row)
        assert json.loads(json.dumps(protocol)) == protocol
        assert row.config.keys() <= protocol["row"].keys()


def test_a_protocol_says_what_was_chosen_and_no_default():
    given = {
        "meta_learning": {"algorithm": "protonet", "seed": 4},
        "learner": {"scale": 20.0},
        "model": {"backbone": "conv4", "hidden_dim": 32},
        "adapter": {"method": "lora", "rank": 4},
    }
    config = MetaLearningConfig.from_dict(given)
    assert chosen(config) == given
    assert MetaLearningConfig.from_dict(chosen(config)) == config
    assert chosen(MetaLearningConfig.from_dict({"model": {"backbone": "mlp"}})) == {"model": {"backbone": "mlp"}}


def test_the_command_writes_a_table_that_says_it_was_quick(tmp_path):
    command = [sys.executable, "-m", "efficientai_toolkit", "reproduce", "sinusoid", "maml-5", "alpaca-*"]
    done = subprocess.run([*command, "--quick", "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "reproduce_sinusoid_quick"
    text = (folder / "sinusoid.md").read_text()
    assert "**Made with `--quick`" in text
    assert "| 5-shot | 10-shot |" in text
    assert "(0.686)" in text
    record = json.loads((folder / "maml-5.json").read_text())
    assert record["quick"] is True
    assert "paths" not in record["config"]
    assert str(tmp_path) not in json.dumps(record)
    assert record["command"] == "efficientai-toolkit meta-learning-peft:reproduce sinusoid maml-5 --quick"


def test_a_row_is_a_record_for_each_seed(tmp_path):
    table = load_table("sinusoid")
    (row,) = table.chosen(["maml-5"])
    records = [table.run(row, tmp_path, quick=True, seed=seed) for seed in (0, 3)]
    assert [record["seed"] for record in records] == [0, 3]
    assert records[0]["ours"]["mean"] != records[1]["ours"]["mean"]
    assert records[1]["command"].endswith("maml-5 --seed 3 --quick")
    assert (tmp_path / "maml-5-seed3.json").is_file()
    assert table.records(tmp_path) == records
    mean, half = (np.mean([record["ours"][name] for record in records]) for name in ("mean", "ci95"))
    text = table.write(tmp_path).read_text()
    assert f"| MAML | **{mean:.3f}** ± {half:.3f}, 2 seeds (0.686) |" in text
    assert "± is the mean of the seeds' own 95 % intervals" in text


def test_a_diverged_row_is_shown_as_such():
    table = load_table("sinusoid")
    record = {
        "row": "maml-5",
        "line": "MAML",
        "column": "5-shot",
        "quick": False,
        "ours": {"mean": None, "ci95": None, "steps": 1},
        "paper": 0.686,
        "source": "",
        "note": "",
        "train_seconds": 1.0,
        "iterations": 100,
        "config": {"meta_learning": {"outer_lr": 0.01}},
    }
    text = table.markdown([record])
    assert "| MAML | diverged | 1 | 100 at 0.01 | 1 s |" in text
    assert "seeds' own" not in text

"""`benchmark --peft`, and its workloads as the comparison with other frameworks has them (here: with itself)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.adapters.attach import flat_parameters
from efficientai_toolkit.cli.benchmark import benchmark as command
from efficientai_toolkit.errors import ConfigurationError, ToolkitError
from efficientai_toolkit.learners.maml import MAMLLearner
from efficientai_toolkit.recipes.benchmark_peft import FULL, QUICK, benchmark_peft, lora, meta_batch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_setting_is_timed():
    before, seen = mx.default_device(), []
    report = benchmark_peft(device="cpu", quick=True, each=seen.append)
    assert mx.default_device() == before
    rows = report["peft"]
    assert seen == rows
    settings = ["all layers", "last two layers", "last two, cache"]
    assert [(row["name"], row["adapters"]) for row in rows] == [(n, s) for n in ("fomaml", "maml") for s in settings]
    for row in rows:
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["peak_bytes"] > 0
        assert np.isfinite(row["query_loss"])
    for plain, cached in ((rows[1], rows[2]), (rows[4], rows[5])):
        assert cached["speedup"] == plain["ms"]["median"] / cached["ms"]["median"]
    json.dumps(report, allow_nan=False)


def test_the_full_size_is_that_of_minilm():
    learner, batches = lora(MAMLLearner, FULL, upper=False, cached=False)
    sizes = {path: array.size for path, array in flat_parameters(learner.model).items()}
    assert sum(sizes.values()) - learner.num_trainable == 22_565_376  # of MiniLM without its pooler
    assert learner.num_trainable == 6 * 2 * 8 * (384 + 384) + 5 * 385
    assert batches(0)[0].support_x.shape == (4, 25, 32)


def test_the_cache_changes_no_loss():
    losses = []
    for cached in (False, True):
        learner, batches = lora(MAMLLearner, QUICK, upper=True, cached=cached)
        losses.append([learner.meta_update(batches(i))["query_loss"].item() for i in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


def test_sentences_are_of_words_alone():
    ids = np.array(meta_batch(FULL).support_x)
    assert ids.min() > FULL.encoder.sep_id
    assert ids.max() < FULL.encoder.vocab_size


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    command(peft=True, workload=["fomaml"], quick=True, device="cpu", save=tmp_path / "new" / "peft.json")
    shown = capsys.readouterr()
    assert "last two, cache" in shown.out
    assert "2 tasks × (5 + 5)" in " ".join(shown.out.split())
    assert "fomaml, all layers: " in shown.err
    assert len(json.loads((tmp_path / "new" / "peft.json").read_text())["peft"]) == 3


def test_what_there_is_not_is_refused():
    with pytest.raises(ToolkitError, match="no workload over LoRA is called conv4; there are fomaml, maml"):
        benchmark_peft(quick=True, only=["conv4"])
    with pytest.raises(ConfigurationError, match="one at a time"):
        command(peft=True, learners=True)


@pytest.mark.parametrize("name", ["f", "g"])
def test_the_contestants_compute_the_same(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from encoder_workloads import ENCODER_WORKLOADS, encoder_arrays
    from peers.encoder_ours import make

    sizes = {"vocabulary": 200, "width": 16, "heads": 2, "hidden": 32, "tasks": 2, "support": 5, "query": 5}
    work = dataclasses.replace(ENCODER_WORKLOADS[name], length=8, **sizes)
    arrays = encoder_arrays(work)
    losses = []
    for contestant in ("ours", "ours, prefix cache"):
        steps = make(work, arrays, contestant)
        losses.append([steps(1) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]

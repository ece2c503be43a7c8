"""A few examples of every class, the whole test set: draws, what is chosen without it, and the table's rows."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.backbones.bert import load_encoder
from efficientai_toolkit.errors import DataError
from efficientai_toolkit.recipes.all_classes import finetuned, logistic, validation
from efficientai_toolkit.recipes.finetune import drawn, measured_on, read_task
from efficientai_toolkit.recipes.reproduce import intents as table
from efficientai_toolkit.recipes.reproduce import intents_rows as rows
from efficientai_toolkit.recipes.reproduce.intents import TABLE
from efficientai_toolkit.recipes.reproduce.table import Row, Run
from text_models import THINGS, sentences, write_encoder, write_intents


@pytest.fixture
def root(tmp_path):
    """BANKING77's files with eight intents: sixteen training and four test texts each."""
    folder = tmp_path / "data" / "banking77"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        rows = [
            f"{text},{label}"
            for label in THINGS
            for number, text in enumerate(sentences(label))
            if (number % 5 == 4) == (name == "test")
        ]
        (folder / f"{name}.csv").write_text("text,category\n" + "\n".join(rows) + "\n")
    return folder.parent


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny encoder in MiniLM's place, and every class in every split."""
    adapter = {"method": "lora", "target_modules": ["layers.2.attention.q_proj"], "rank": 2}
    monkeypatch.setattr(rows, "SOURCE", str(write_encoder(tmp_path / "encoder")))
    monkeypatch.setattr(rows, "ADAPTERS", {"lora": adapter})
    whole = {split: np.arange(8) for split in ("train", "val", "test")}
    monkeypatch.setattr("efficientai_toolkit.tasks.intents.split_classes", lambda *_: whole)


def test_a_draw_is_balanced_and_its_validation_texts_are_others(root):
    task = read_task("banking77", None, root)
    assert (len(task.train.texts), len(task.test.texts)) == (128, 32)
    own = drawn(task, 3, seed=1)
    assert np.bincount(own.train.labels).tolist() == [3] * 8
    assert own.test is task.test
    assert own.train.texts == drawn(task, 3, seed=1).train.texts
    assert own.train.texts != drawn(task, 3, seed=2).train.texts
    held = validation(task, 3, seed=1, limit=50)
    assert held.train.texts == own.train.texts
    assert len(held.test.texts) == 50
    assert not {*held.test.texts} & {*own.train.texts}
    assert not {*held.test.texts} & {*task.test.texts}
    labels = dict(zip(task.train.texts, task.train.labels, strict=True))
    assert [labels[text] for text in held.test.texts] == held.test.labels.tolist()
    assert len(measured_on(task, 5).test.texts) == 5
    assert measured_on(task, 32) is task
    with pytest.raises(DataError, match="has 16 training texts, fewer than 17"):
        drawn(task, 17, seed=0)


def test_logistic_regression_on_a_draw_tells_the_words_apart(root, tmp_path):
    source = str(write_encoder(tmp_path / "encoder"))
    found = logistic(load_encoder(source), source, read_task("banking77", None, root), 8, (0, 1))
    assert min(found.accuracies) > 0.4  # chance is an eighth
    assert found.accuracies[0] != found.accuracies[1]


def test_fine_tuning_begins_where_logistic_regression_ends(root, tmp_path):
    source, task = str(write_encoder(tmp_path / "encoder")), read_task("banking77", None, root)
    adapter = {"method": "lora", "target_modules": ["layers.2.attention.q_proj"], "rank": 2}
    still = {"learning_rate": 1e-9, "epochs": 1, "batch_size": 16}
    begun = finetuned(task, adapter, 8, (0, 1), source=source, **still)
    logits = logistic(load_encoder(source), source, task, 8, (0, 1))
    assert begun.chosen == logits.chosen
    # The regression was fitted on features of length one, the head takes them as they are.
    assert begun.accuracies == pytest.approx(logits.accuracies, abs=0.07)


@pytest.mark.parametrize("row", [row for row in TABLE.rows if row.column == rows.ALL], ids=lambda row: row.name)
def test_rows_over_all_classes(root, small, tmp_path, row):
    config = dict(row.config)
    if config["kind"] == "protonet":
        config |= {"trains_on": str(write_intents(tmp_path / "mine.csv")), "without": []}
    row = Row(row.name, row.line, row.column, config, row.paper, row.source)
    record = TABLE.run(row, tmp_path / "out", data_dir=root, quick=True)
    assert len(record["accuracies"]) == 2
    assert record["ours"]["mean"] == pytest.approx(np.mean(record["accuracies"]))
    assert record["ours"]["ci95"] == pytest.approx(12.706 * np.std(record["accuracies"], ddof=1) / 2**0.5)
    scores = record["chosen"]["validation_accuracy"]
    assert scores[f"{record['chosen']['c']:g}"] == max(scores.values())
    assert TABLE.run(row, tmp_path / "out", data_dir=root, quick=True) == json.loads(json.dumps(record))
    text = TABLE.write(tmp_path / "out").read_text()
    shown = f"| {row.line} | **{100 * record['ours']['mean']:.1f}** ± {100 * record['ours']['ci95']:.1f} |"
    assert f"{shown} {'' if row.paper is None else '80.0'} | 2 |" in text
    assert ("MTEB" in text) == (row.paper is not None)
    assert "| BANKING77, 5-way 1-shot |" in text


def test_the_meta_learned_row_takes_what_the_transfer_row_trained(root, small, tmp_path):
    config = {"kind": "protonet", "adapter": "lora", "dataset": str(write_intents(tmp_path / "mine.csv"))}
    unseen = Row(rows.TRANSFER, "transfer", "BANKING77", config)
    first = TABLE.run(unseen, tmp_path / "out", data_dir=root, quick=True)
    own = {**config, "trains_on": config["dataset"], "dataset": "banking77", "shots": 8, "draws": 10}
    everything = Row("all-classes-mine", "all", rows.ALL, own)
    second = TABLE.run(everything, tmp_path / "out", data_dir=root, quick=True)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert second["best_validation"] == first["best_validation"]


def test_a_weight_of_zero_takes_the_meta_learned_adapter_away(root, small, tmp_path):
    config = {"kind": "protonet", "adapter": "lora", "dataset": str(write_intents(tmp_path / "mine.csv"))}
    trained = Row("mine", "line", "BANKING77", config)
    without = Row("mine-off", "line", "BANKING77", {**config, "weight": 0.0}, trained_as="mine")
    frozen = Row("prototypes", "line", "BANKING77", {**config, "kind": "prototypes", "adapter": None})
    run = Run(tmp_path / "out", "mine", 0, root, True, None)
    measured = {}
    for row in (trained, without, frozen):
        model = table._method(row, run)[0].model
        measured[row.name] = np.array(model.features(mx.arange(1, 9)[None]))
    assert np.array_equal(measured["mine-off"], measured["prototypes"])
    assert not np.array_equal(measured["mine"], measured["prototypes"])
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1

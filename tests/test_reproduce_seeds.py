"""Seeds of the tables on texts: others give other draws and starts, and what has nothing random refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit.errors import ConfigurationError
from efficientai_toolkit.intervals import mean_ci95
from efficientai_toolkit.nn.functional import trainable
from efficientai_toolkit.recipes import all_classes, episode_finetune
from efficientai_toolkit.recipes import finetune as texts
from efficientai_toolkit.recipes.reproduce import glue, intents, load_table
from efficientai_toolkit.recipes.reproduce import intents_rows as rows
from efficientai_toolkit.recipes.reproduce.table import Row, Run
from text_models import write_encoder

RECORDS = Path(__file__).parent.parent / "benchmarks" / "records"


def run_of(folder: Path, seed: int, quick: bool = False) -> Run:
    return Run(folder, "row", seed, None, quick, None)


@pytest.mark.parametrize("name", ["glue", "intents"])
def test_the_records_of_the_repository_are_of_the_tables_as_they_stand(name):
    table = load_table(name)
    known = {row.name: row for row in table.rows}
    records = [json.loads(file.read_text()) for file in sorted((RECORDS / name).glob("*.json"))]
    assert records
    for record in records:
        row = known[record["row"]]
        table.check_seed([row], record["seed"])
        assert record.get("protocol", table.protocol(row)) == table.protocol(row), record["row"]


def test_a_seed_has_draws_of_its_own_over_all_classes(tmp_path, monkeypatch):
    asked = []

    def logistic(model, source, task, shots, seeds):
        asked.append(list(seeds))
        return all_classes.Measured([0.5 + 0.01 * seed for seed in seeds], {})

    monkeypatch.setattr(all_classes, "logistic", logistic)
    monkeypatch.setattr(intents, "_frozen", lambda: (None, {"train_seconds": 0.0}))
    monkeypatch.setattr(texts, "read_task", lambda *_: None)
    (row,) = intents.TABLE.chosen(["all-classes-logistic"])
    records = [intents.TABLE.run(row, tmp_path, seed=seed) for seed in (0, 1)]
    assert asked == [list(range(10)), list(range(10, 20))]
    line = next(line for line in intents.TABLE.markdown(records).splitlines() if line.startswith(f"| {row.line}"))
    assert line.endswith("(2 seeds) | 80.0 | 20 |")
    assert "the seeds' own 95 % intervals" in intents.TABLE.markdown(records)


def test_a_seed_has_draws_of_its_own_in_glue(tmp_path, monkeypatch):
    task = SimpleNamespace(train=SimpleNamespace(texts=[""] * 100), names=["a", "b"], metric="accuracy")
    asked = []

    def finetuned(task, method, *, seed, **_):
        asked.append((task, seed))
        return SimpleNamespace(curve=[{"score": [0.5, 0.7, 0.6, 0.9, 0.8, 0.7][seed]}])

    monkeypatch.setattr(texts, "read_task", lambda *_: task)
    monkeypatch.setattr(texts, "drawn", lambda task, shots, seed: seed)
    monkeypatch.setattr(texts, "finetune", finetuned)
    (row,) = glue.TABLE.chosen(["lora-sst2"])
    records = [glue.TABLE.run(row, tmp_path, seed=seed) for seed in (0, 1)]
    assert asked == [(seed, seed) for seed in range(6)]
    assert [record["scores"] for record in records] == [[0.5, 0.7, 0.6], [0.9, 0.8, 0.7]]
    assert "| **60.0** ± 24.8 |" in glue.TABLE.markdown(records[:1])
    mean, ci95 = mean_ci95([0.5, 0.7, 0.6, 0.9, 0.8, 0.7])
    assert ci95 is not None
    assert f"| **{100 * mean:.1f}** ± {100 * ci95:.1f} (6 seeds) |" in glue.TABLE.markdown(records)


def test_a_seed_has_an_adapter_s_start_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SOURCE", str(write_encoder(tmp_path / "encoder")))
    adapter = {"method": "lora", "target_modules": ["layers.2.attention.q_proj"], "rank": 2}
    monkeypatch.setattr(rows, "ADAPTERS", {"lora": adapter})
    monkeypatch.setattr(episode_finetune, "finetune", lambda model, *_, **__: trainable(model))
    row = Row("mine", "line", "BANKING77", {"kind": "finetune", "adapter": "lora", "learning_rate": 1e-3})
    starts = [intents._method(row, run_of(tmp_path, seed))[0](None, None) for seed in (0, 0, 1)]
    (path,) = (path for path in starts[0] if path.endswith("lora_a"))
    assert mx.array_equal(starts[0][path], starts[1][path])
    assert not mx.array_equal(starts[0][path], starts[2][path])


@pytest.mark.parametrize(
    ("table", "random", "same"),
    [
        (
            intents.TABLE,
            ["finetune-lora-banking77", "protonet-lora-clinc150", "all-classes-logistic", rows.TRANSFER],
            ["prototypes-banking77", "centred-clinc150", "finetune-full-clinc150", "logistic-banking77-division1"],
        ),
        (glue.TABLE, ["logistic-cola", "lora-cb", "meta-lora-rte"], ["logistic-boolq", "logistic-cb"]),
    ],
    ids=["intents", "glue"],
)
def test_a_seed_for_what_has_nothing_random_is_refused(tmp_path, table, random, same):
    table.check_seed(table.chosen(random), 1)
    table.check_seed(table.rows, 0)
    for name in same:
        with pytest.raises(ConfigurationError, match=f"nothing is random in {name} of table .*--seed 2 would give"):
            table.run(*table.chosen([name]), tmp_path, seed=2)
    with pytest.raises(ConfigurationError, match=", ".join(same)):
        table.check_seed(table.chosen([*random, *same]), 1)
    assert not list(tmp_path.iterdir())


def test_what_is_no_seed_is_refused():
    with pytest.raises(ConfigurationError, match="seed must be a whole number from 0"):
        glue.TABLE.check_seed([], -1)


def test_a_seed_has_others_of_its_own_in_continual_learning():
    table = load_table("continual")
    (row,) = table.chosen(["split-domain-ewc"])
    assert [list(table.plan(row, seed=seed, quick=False).seeds) for seed in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    record = json.loads((RECORDS / "continual" / "split-domain-ewc.json").read_text())
    runs = record["evaluation"]["runs"]
    better = {name: {**run, "matrix": np.ones_like(run["matrix"]).tolist()} for name, run in runs.items()}
    two = [record, {**record, "evaluation": {"runs": better}}]
    line = next(line for line in table.markdown(two).splitlines() if line.startswith("| EWC"))
    mean = (record["ours"]["mean"] + 1) / 2
    assert f"**{100 * mean:.2f}**" in line
    assert line.endswith("(63.95), 6 seeds |")

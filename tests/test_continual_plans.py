"""What belongs together in a run folder: results of one plan, seeds paired with the same seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efficientai_toolkit.continual import figures, report
from efficientai_toolkit.continual.run import Plan, run, summarise
from efficientai_toolkit.errors import ConfigurationError
from efficientai_toolkit.recipes import continual
from efficientai_toolkit.recipes.reproduce import load_table
from efficientai_toolkit.recipes.reproduce.table import Run


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[str, ...]:
    """Three contexts of two classes each, as a user's files."""
    rng, paths = np.random.default_rng(0), []
    for number in range(3):
        arrays = {}
        for part, n in (("train", 60), ("test", 30)):
            y = rng.integers(0, 2, n)
            arrays |= {f"{part}_x": rng.normal(size=(n, 4)) + 2 * y[:, None] - number, f"{part}_y": y}
        paths.append(str(tmp_path / f"c{number}.npz"))
        np.savez(paths[-1], **arrays)
    return tuple(paths)


def plan(contexts, **changes) -> Plan:
    return Plan(**{"stream": contexts, "kind": "class", "strategies": {"naive": {}}, "iterations": 6, "batch_size": 8,
                   "hidden_dim": 4, "num_layers": 1, **changes})  # fmt: skip


def stopped(plan: Plan, folder: Path) -> None:
    """`plan` as far as its first context."""

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, folder, watch=stop)


def test_a_result_of_other_options_is_not_taken_for_the_plans(contexts, tmp_path):
    run(plan(contexts, strategies={"replay": {"capacity": 6}}), tmp_path)
    with pytest.raises(ConfigurationError, match=r"options of replay was \{'capacity': 6\}, now \{'capacity': 50\}"):
        run(plan(contexts, strategies={"replay": {"capacity": 50}}), tmp_path)
    results = run(plan(contexts, strategies={"naive": {}}), tmp_path)
    assert results["plan"]["strategies"] == {"replay": {"capacity": 6}, "naive": {}}  # of every run that is there
    with pytest.raises(ConfigurationError, match="options of replay"):
        run(plan(contexts, strategies={"replay": {"capacity": 50}}), tmp_path)


@pytest.mark.parametrize("changed", [{"iterations": 5}, {"strategies": {"si": {"si_c": 7.0}}}])
def test_a_checkpoint_of_another_plan_is_not_gone_on_with(contexts, tmp_path, changed):
    first = plan(contexts, strategies={"si": {"si_c": 2.0}})
    stopped(first, tmp_path)
    with pytest.raises(ConfigurationError, match=r"si-seed0\.npz is of another experiment"):
        run(plan(contexts, **{"strategies": {"si": {"si_c": 2.0}}, **changed}), tmp_path)
    assert len(run(first, tmp_path)["runs"]["si/seed0"]["matrix"]) == 3


def test_the_order_of_contexts_is_the_first_seeds(contexts, tmp_path, monkeypatch):
    from efficientai_toolkit.continual import run as module

    built = module.build_scenario

    def named(*arguments, seed, **options):
        scenario = built(*arguments, seed=seed, **options)
        parts = tuple(part._replace(name=f"{part.name} of seed {seed}") for part in scenario.parts)
        return type(scenario)(scenario.name, scenario.kind, parts, scenario.active)

    monkeypatch.setattr(module, "build_scenario", named)
    assert run(plan(contexts, seeds=(1,)), tmp_path)["contexts"][0] == "c0 of seed 1"
    results = run(plan(contexts, seeds=(0, 1, 2)), tmp_path)
    assert results["contexts"] == [f"c{k} of seed 0" for k in range(3)]
    assert "the order of the first seed" in report.text(results, {})


def test_seeds_that_were_added_later_pair_with_the_same_seeds(contexts, tmp_path):
    run(plan(contexts, seeds=(1,)), tmp_path)
    results = run(plan(contexts, strategies={"naive": {}, "replay": {}}, seeds=(0, 1)), tmp_path)
    assert next(iter(results["runs"])) == "naive/seed1"
    for name in ("naive", "replay"):
        measured = [results["runs"][f"{name}/seed{seed}"] for seed in (0, 1)]
        assert results["summary"][name]["average_accuracy"]["values"] == [r["average_accuracy"] for r in measured]
        assert figures.by_strategy(results)[name] == measured
    assert run(plan(contexts, seeds=(1,)), tmp_path)["plan"]["seeds"] == [0, 1]


def test_a_seed_without_a_value_leaves_the_others_in_their_place():
    def record(value):
        return {"average_accuracy": 0.5, "backward_transfer": value}

    found = summarise({"a/seed2": record(-0.3), "a/seed0": record(-0.1), "a/seed1": record(None), "b/seed1": record(0)})
    assert found["a"]["backward_transfer"]["values"] == [-0.1, None, -0.3]
    assert found["a"]["backward_transfer"]["mean"] == pytest.approx(-0.2)
    assert found["b"]["backward_transfer"]["values"] == [None, 0, None]
    assert (found["a"]["seeds"], found["b"]["seeds"]) == (3, 1)
    assert figures.told_apart([0.9, None, 0.8, 0.91], [0.1, 0.9, 0.01, 0.1]) == 1
    assert figures.leaders({"a": [None, 0.2], "b": [0.1, None]}) == ["a", "b"]


def test_two_seeds_with_the_same_difference_tell_nothing():
    assert figures.told_apart([0.5, 0.625], [0.375, 0.5]) == 0
    assert figures.told_apart([0.5, 0.6250000001], [0.375, 0.5]) == 0
    assert figures.told_apart([0.5, 0.625, 0.75], [0.375, 0.5, 0.625]) == 1
    assert figures.told_apart([0.5, 0.626], [0.375, 0.5]) == 1


def test_a_strategy_alone_has_no_others_to_be_above(contexts, tmp_path):
    title = figures.forgetting(run(plan(contexts), tmp_path))._suptitle.get_text().replace("\n", " ")
    assert "fine-tuning ends at " in title
    assert "highest" not in title


def test_a_table_whose_settings_changed_is_measured_by_the_new_ones(tmp_path, data_dir, monkeypatch):
    table = load_table("continual")
    (row,) = table.chosen(["split-task-si"])
    monkeypatch.setitem(continual._QUICK, "iterations", 2)

    def measured(folder: Path) -> dict:
        found = table.measure(row, Run(folder, row.name, 0, data_dir, True, None))
        assert found["config"]["strategies"] == {"si": {"si_c": continual._C["split-mnist"]["task"]}}
        return found["evaluation"]["runs"]["si/seed0"]

    before = measured(tmp_path / "a")
    monkeypatch.setitem(continual._C, "split-mnist", {"task": 1e6})
    after = measured(tmp_path / "a")
    assert after["matrix"] == measured(tmp_path / "b")["matrix"] != before["matrix"]
    monkeypatch.setitem(continual._QUICK, "iterations", 3)
    assert measured(tmp_path / "a")["curves"][0]["steps"][-1] == 3


def test_the_report_says_what_was_done(contexts, tmp_path):
    strategies = {"naive": {}, "joint": {}, "progressive": {}, "separate": {}}
    several = report.text(run(plan(contexts, kind="task", strategies=strategies), tmp_path / "several"), {})
    assert "for 6 steps of at most 8 examples" in several
    assert "Joint training takes 18 steps on all contexts at once." in several
    assert "Progressive networks grow a column of 2 × 4 units a context." in several
    assert "Separate weights are a network a context." in several
    assert "BWT is how much" in several
    assert "FWT how much" in several
    one = report.text(run(plan(contexts[:1]), tmp_path / "one"), {})
    assert one.startswith("# Continual learning: 1 file, ")
    assert "learns 1 context in turn" in one
    assert not any(word in one for word in ("BWT", "FWT", "forgetting", "Joint", "Progressive", "Separate"))

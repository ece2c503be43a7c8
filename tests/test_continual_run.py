"""The experiment: resumed to the same bits, reported from its results alone, and refused in sentences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.transforms import Bbox
from typer.testing import CliRunner

from efficientai_toolkit.cli import app
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.continual import figures, report
from efficientai_toolkit.continual.run import Plan, run
from efficientai_toolkit.errors import ConfigurationError, DataError
from efficientai_toolkit.recipes.continual import plan_of
from efficientai_toolkit.recipes.melpa import MeLPAConfig
from efficientai_toolkit.recipes.reproduce import load_table
from efficientai_toolkit.runs.experiment import open_run


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[str, ...]:
    """Three contexts of two classes each, as a user's files."""
    rng, paths = np.random.default_rng(0), []
    for number in range(3):
        arrays = {}
        for part, n in (("train", 80), ("test", 40)):
            y = rng.integers(0, 2, n)
            arrays |= {f"{part}_x": rng.normal(size=(n, 5)) + 3 * y[:, None] - number, f"{part}_y": y}
        paths.append(str(tmp_path / f"context{number}.npz"))
        np.savez(paths[-1], **arrays)
    return tuple(paths)


def plan(contexts, **changes) -> Plan:
    strategies = {"naive": {}, "joint": {}, "replay": {"capacity": 20}, "si": {"si_c": 1.0}}
    return Plan(**{"stream": contexts, "kind": "class", "strategies": strategies, "iterations": 12, "batch_size": 16,
                   "hidden_dim": 6, "num_layers": 1, **changes})  # fmt: skip


def without_times(results: dict) -> dict:
    return {key: {name: value for name, value in record.items() if name != "seconds"}
            for key, record in results["runs"].items()}  # fmt: skip


def test_a_run_stopped_anywhere_ends_where_the_whole_one_ends(contexts, tmp_path):
    whole = run(plan(contexts), tmp_path / "whole")
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) in (2, 6):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(plan(contexts), tmp_path / "parts", watch=stop)
    parts = run(plan(contexts), tmp_path / "parts", watch=stop)
    assert without_times(parts) == without_times(whole)
    assert len(lines) == 3 * 3 + 1  # every context once, of joint the last
    assert parts["contexts"] == ["context0", "context1", "context2"]
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.npz"))


def test_records_hold_what_was_measured(contexts, tmp_path):
    results = run(plan(contexts, seeds=(0, 1)), tmp_path)
    record = results["runs"]["naive/seed0"]
    matrix = np.array(record["matrix"])
    assert matrix.shape == (3, 3)
    assert record["average_accuracy"] == pytest.approx(matrix[-1].mean())
    assert [curve["steps"] for curve in record["curves"]] == [[0, 1, 2, 5, 10, 12]] * 3
    assert record["parameters"] == (5 * 6 + 6) + (6 * 6 + 6)
    assert results["runs"]["replay/seed0"]["memory_bytes"] == 20 * (5 * 4 + 4 + 4)
    assert results["runs"]["joint/seed0"]["matrix"][0] == [None] * 3
    assert results["runs"]["joint/seed0"]["backward_transfer"] is None
    values = results["summary"]["naive"]["average_accuracy"]
    assert values["values"] == [results["runs"][f"naive/seed{s}"]["average_accuracy"] for s in (0, 1)]


def test_more_seeds_and_strategies_are_added_and_other_plans_refused(contexts, tmp_path):
    run(plan(contexts, strategies={"naive": {}}), tmp_path)
    results = run(plan(contexts, strategies={"naive": {}, "lwf": {}}, seeds=(0, 1)), tmp_path)
    assert set(results["runs"]) == {"naive/seed0", "naive/seed1", "lwf/seed0", "lwf/seed1"}
    with pytest.raises(ConfigurationError, match="iterations was 12, now 13"):
        run(plan(contexts, iterations=13), tmp_path)


def test_the_report_is_drawn_from_results_alone(contexts, tmp_path):
    run(plan(contexts, quick=True), tmp_path)
    path, drawn = report.write(tmp_path)
    text = path.read_text()
    assert {figure.name for figure in drawn} == {
        "accuracy_matrices.png", "forgetting.png", "adaptation_speed.png", "accuracy_and_memory.png"
    }  # fmt: skip
    assert "QUICK" in text
    assert "One seed: " in text
    assert all(f"figures/{figure.name}" in text for figure in drawn)
    results = json.loads((tmp_path / "results.json").read_text())
    assert f"{100 * results['summary']['si']['average_accuracy']['mean']:.2f} %" in text
    first = drawn[0].read_bytes()
    report.write(tmp_path)
    assert drawn[0].read_bytes() == first
    (tmp_path / "results.json").write_text('{"experiment": "other"}')
    with pytest.raises(DataError, match="no finished run"):
        report.write(tmp_path)


def test_published_settings_give_way_to_what_is_asked():
    published = plan_of({"stream": "split-mnist", "kind": "domain", "strategies": {"ewc": {}, "si+replay": {}}})
    assert published.strategies["ewc"] == {"ewc_lambda": 1e10}
    assert published.strategies["si+replay"]["replay"]["per_group"] == 100
    assert (published.iterations, published.hidden_dim) == (2000, 400)
    asked = plan_of(
        {"stream": "permuted-mnist", "kind": "domain", "strategies": {"ewc": {}, "replay": {}}, "iterations": 7},
        {"ewc": {"ewc_lambda": 3.0}},
    )
    assert asked.strategies == {"ewc": {"ewc_lambda": 3.0}, "replay": {"capacity": 1000, "per_group": 10}}
    assert (asked.iterations, asked.learning_rate) == (7, 1e-4)
    with pytest.raises(ConfigurationError, match="which is not run"):
        plan_of({"strategies": {"naive": {}}}, {"ewc": {"ewc_lambda": 3.0}})
    with pytest.raises(ConfigurationError, match="must be told the task"):
        plan_of({"kind": "class", "strategies": {"progressive": {}}})


def test_the_command_runs_resumes_and_reports(contexts, tmp_path):
    files = [word for path in contexts for word in ("--file", path)]
    command = ["continual", "--scenario", "class", *files, "--strategies", "naive,replay", "--quick", "--json"]

    def told(*arguments: str) -> dict:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        return result.stderr

    first = told(*command, "--option", "replay.capacity=10", "--output", str(tmp_path / "out"))
    assert Path(first["report"]).is_file()
    assert set(first["summary"]) == {"naive", "replay"}
    assert told("continual", "--resume", first["run"], "--json")["summary"] == first["summary"]
    (Path(first["run"]) / "results.md").unlink()
    assert told("report", first["run"], "--json")["report"] == first["report"]
    assert Path(first["report"]).is_file()
    assert "did you mean 'naive'" in refused(*command, "--strategies", "nave")
    assert "STRATEGY.NAME=VALUE" in refused(*command, "--option", "replay")
    assert "is not a run folder" in refused("continual", "--resume", str(tmp_path / "none"))


def test_the_table_has_every_published_number_and_a_row_leaves_a_record(tmp_path, data_dir):
    table = load_table("continual")
    assert len(table.rows) == 36
    (row,) = table.chosen(["split-class-naive"])
    assert row.paper == 19.90
    record = table.run(row, tmp_path, data_dir=data_dir, quick=True)
    assert record == table.run(row, tmp_path, data_dir=data_dir, quick=True)
    written = table.write(tmp_path).read_text()
    assert f"**{100 * record['ours']['mean']:.2f}** (19.90)" in written
    assert "--quick" in written


def test_names_lie_on_no_point_no_bar_and_no_name():
    """Of the record with ten methods, most of them near one another."""
    record = json.loads((Path(__file__).parents[1] / "benchmarks/records/continual/melpa.json").read_text())
    record["plan"] = {"stream": "unseen tasks", "kind": "task", "quick": False}
    figure = figures.memory(record)
    figure.draw_without_rendering()
    axis = figure.axes[0]
    names = {text.get_text(): text.get_window_extent() for text in axis.texts if text.get_text()}
    assert set(names) == {figures.title_of(name) for name in record["summary"]}
    marks = [line.get_window_extent() for line in axis.lines]
    bars = [Bbox(axis.transData.transform(bar.get_segments()[0])) for bar in axis.collections]
    assert len(marks) == len(bars) * 3  # a point and two caps
    for name, box in names.items():
        others = [*marks, *bars, *(other for label, other in names.items() if label != name)]
        assert not any(box.overlaps(other) for other in others), name
        assert (box.min >= axis.get_window_extent().min).all()
        assert (box.max <= axis.get_window_extent().max).all()


def test_titles_fit_the_figure_and_steps_that_were_measured_are_ticks(contexts, tmp_path):
    results = run(plan(contexts), tmp_path)
    figure = figures.forgetting(results)
    lines = figure._suptitle.get_text().splitlines()
    assert " ".join(lines).endswith("; one seed, differences are not tested")
    assert max(map(len, lines)) <= 65
    assert figures.adaptation(results).axes[0].get_xticks().tolist() == [0, 1, 2, 5, 10]


def test_a_winner_is_named_where_the_seeds_tell_it_apart():
    assert figures.told_apart([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]) == 1  # seed by seed, however far the seeds are apart
    assert figures.told_apart([0.8, 0.7], [0.9, 0.803, 0.7]) == -1  # the third seed has nothing to pair with
    assert figures.told_apart([0.9, 0.7], [0.8, 0.7]) == 0
    assert figures.told_apart([0.9], [0.1]) == 0
    values = {"naive": [0.5, 0.6, 0.5], "ewc": [0.8, 0.9, 0.7], "replay": [0.81, 0.85, 0.78]}
    assert figures.leaders(values) == ["replay", "ewc"]
    del values["ewc"]
    assert figures.leaders(values) == ["replay"]


def test_all_options_are_checked_before_the_first_step(contexts, tmp_path):
    for strategies, said in (
        ({"naive": {}, "ewc": {"lam": 3}}, "strategy 'ewc' has no option 'lam'"),
        ({"naive": {}, "replay": {"weighting": "x"}}, "weighting='x'"),
        ({"naive": {}, "ewc": {"ewc_lambda": "abc"}}, r"'ewc' cannot be built from \{'ewc_lambda': 'abc'\}"),
        ({"naive": {}, "progressive": {"width": 3}}, "strategy 'progressive' has no option 'width'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            plan(contexts, kind="task", strategies=strategies)
    files = [word for path in contexts for word in ("--file", path)]
    command = ["continual", *files, "--strategies", "naive,ewc", "--quick", "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*command, "--option", "ewc.lam=3"]).exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "continual", "melpa"])
@pytest.mark.parametrize(
    ("made_by", "config"),
    [
        ("train", MetaLearningConfig().to_dict()),
        ("continual", Plan().describe()),
        ("melpa", MeLPAConfig().to_dict()),
        (None, {"seed": 1}),
    ],
)
def test_a_run_of_another_command_is_gone_on_with_by_that(tmp_path, command, made_by, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if made_by == command:
        assert open_run(tmp_path, command).config == config
        return
    said = CliRunner().invoke(app, [command, "--resume", str(tmp_path)])
    assert said.exit_code == 2
    own = f"`{made_by}`; go on with `{made_by} --resume {tmp_path}`" if made_by else "no command that goes on"
    assert said.stderr == f"Error: {tmp_path} was made by {own}\n"


def test_sentences_name_a_winner_only_where_the_seeds_tell_it_apart():
    def summary(replay, naive):
        return {
            name: {
                "average_accuracy": {"mean": sum(values) / 3, "values": values},
                "backward_transfer": {"mean": sum(values) / 3 - 1, "values": [value - 1 for value in values]},
            }
            for name, values in (("naive", naive), ("replay", replay))
        }

    (sentence,) = report.reading(summary([0.8, 0.82, 0.81], [0.2, 0.21, 0.2]))
    assert "replay ends highest, at 81.0 %, 60.7 points above plain fine-tuning" in sentence
    assert "eplay forgets least" in sentence
    (sentence,) = report.reading(summary([0.9, 0.2, 0.7], [0.3, 0.6, 0.5]))
    assert sentence.startswith("The seeds do not tell apart which strategy ends highest: ")
    assert "Nor which forgets least" in sentence
    (sentence,) = report.reading(summary([0.9], [0.3]))
    assert sentence == "One seed: differences between strategies are not tested."

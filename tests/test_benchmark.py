"""The `benchmark` command, and the harness that compares with other frameworks (here: with itself)."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from efficientai_toolkit.cli.benchmark import benchmark as command
from efficientai_toolkit.errors import DeviceError, ToolkitError
from efficientai_toolkit.recipes import benchmark as recipe
from efficientai_toolkit.recipes.benchmark import benchmark, workloads
from efficientai_toolkit.recipes.benchmark_learners import COMPARISONS, characters, compare_learners

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_workload_is_timed():
    before = mx.default_device()
    seen = []
    report = benchmark(device="cpu", quick=True, only=["reptile", "hidden 64, meta-batch 8"], each=seen.append)
    assert mx.default_device() == before
    assert [row["name"] for row in report["results"]] == ["reptile", "hidden 64, meta-batch 8"]
    assert seen == report["results"]
    for row in report["results"]:
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["s_per_1000"] == row["ms"]["median"]
        assert row["peak_bytes"] > 0
    assert report["results"][1]["tasks_per_s"] == pytest.approx(8e3 / report["results"][1]["ms"]["median"])
    assert report["gpu_speedup"] == {}
    json.dumps(report, allow_nan=False)


def test_published_sizes_are_among_the_workloads():
    names = [work.name for work in workloads()]
    for width in (64, 256):
        for batch in (4, 8):
            assert f"hidden {width}, meta-batch {batch}" in names


def test_an_unknown_workload_is_refused():
    with pytest.raises(ToolkitError, match="no workload is called nonsense; there are sinusoid"):
        benchmark(quick=True, only=["nonsense"])


def test_one_unknown_workload_among_known_ones_is_refused():
    with pytest.raises(ToolkitError, match="no workload is called conv5; there are"):
        benchmark(quick=True, only=["sinusoid", "conv5"])


def test_a_workload_has_the_name_that_the_table_shows(monkeypatch):
    asked = []
    monkeypatch.setattr(
        recipe, "measure", lambda work, seconds: asked.append((work.name, seconds)) or {"ms": {"median": 1}}
    )
    for seconds in (None, 5.0):
        benchmark(device="cpu", quick=True, only=["h64 b4"], seconds=seconds)
    assert asked == [("hidden 64, meta-batch 4", 0.05), ("hidden 64, meta-batch 4", 5.0)]
    assert recipe.seconds_of(None, False) == 3.0


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    command(workload=["reptile"], quick=True, device="cpu", save=tmp_path / "new" / "benchmark.json")
    shown = capsys.readouterr()
    assert "1000 steps" in shown.out
    assert "reptile: Reptile, 4 tasks" in shown.out
    assert "reptile: " in shown.err
    assert "┃\n" in shown.out
    assert json.loads((tmp_path / "new" / "benchmark.json").read_text())["results"][0]["device"] == "cpu"


def test_a_device_that_is_not_there_is_refused():
    if mx.metal.is_available() or mx.default_device() != mx.cpu:
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError):
        command(quick=True, device="gpu")


def test_learners_are_compared_with_maml(monkeypatch):
    few = {
        name: target for name, target in _learners().items() if name in ("maml", "fomaml", "protonet", "r2d2", "leo")
    }
    monkeypatch.setattr("efficientai_toolkit.recipes.benchmark_learners.LEARNERS", few)
    small = COMPARISONS["images"]._replace(tasks=2, make=partial(characters, count=2))
    monkeypatch.setitem(COMPARISONS, "images", small)
    report = compare_learners(quick=True, device="cpu")
    names = ["fomaml", "leo", "maml", "maml++, annealed"]  # the others do not adapt by steps
    assert [(row["workload"], row["name"]) for row in report["learners"]] == [
        (workload, name) for workload in ("sinusoid", "images") for name in names
    ]
    assert all(row["ratio"] > 0 for row in report["learners"])
    with pytest.raises(ToolkitError, match="on sinusoid and images, not on 'conv4'"):
        compare_learners(quick=True, device="cpu", only=["conv4"])


def _learners():
    from efficientai_toolkit.learners import LEARNERS

    return LEARNERS


def test_the_comparison_verifies_before_it_reports(tmp_path):
    out = tmp_path / "record.json"
    arguments = ["--workload", "c", "--contestant", "ours", "--rounds", "1", "--seconds", "0.1", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads(out.read_text())["workloads"]["c"]["results"]["ours"]
    assert len(ours["losses"]) == 3
    assert ours["losses"][2] < ours["losses"][0]
    assert "| ours |" in out.with_suffix(".md").read_text()


def test_a_peer_that_computes_something_else_is_caught(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    results = {"ours": {"losses": [1.0, 0.9, 0.8]}, "peer": {"losses": [1.0, 0.9, 0.81]}}
    with pytest.raises(SystemExit, match="peer computes something else"):
        run._verify("c", results)
    run._verify("c", {"ours": results["ours"], "ours, with drawing": results["peer"]})

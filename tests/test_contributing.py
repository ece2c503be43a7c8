"""CONTRIBUTING.md's two edits, made in a copy of the package, are all that a new learner takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
USE = """
import json, sys
from pathlib import Path
import efficientai_toolkit
from efficientai_toolkit import MetaLearningConfig, SimpleClassifier, TaskConfig, TaskDistribution, learner_class
from efficientai_toolkit.runs.build import restore
from efficientai_toolkit.runs.train import train

assert Path(efficientai_toolkit.__file__).is_relative_to(sys.argv[1]), efficientai_toolkit.__file__
made = learner_class("NAME")
assert made.__name__ == "CLASS" and made.algorithm == "NAME"
template = TaskConfig("template", "linear_classification", support_size=10, query_size=20)
tasks = TaskDistribution([template], endless=True)
held_out = TaskDistribution([template], 1, endless=True).batch_at(0, 100)
learner = made(SimpleClassifier(hidden_dim=16), inner_lr=0.01, outer_lr=0.005, num_inner_steps=3)
before = learner.evaluate(held_out, num_adaptation_steps=(3,))["step_3_loss"]
learner.meta_train(tasks, num_iterations=60, meta_batch_size=8)
after = learner.evaluate(held_out, num_adaptation_steps=(3,))["step_3_loss"]
config = MetaLearningConfig.from_yaml(sys.argv[2])
report = train(config)
restored = restore(report["checkpoints"]["last"]).learner
assert type(restored) is made and restored.iteration == 5
print(json.dumps({"before": before, "after": after}))
"""


def run(command: list[str], source: Path, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> tuple[Path, str, str]:
    """A copy of `src/` with the learner of CONTRIBUTING.md, and that learner's name and class."""
    source = tmp_path_factory.mktemp("contributing") / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    section = TEXT.partition("## Add a learner")[2].partition("\n## ")[0]
    code = re.search(r"<!-- test: learner -->\n```python\n(.*?)^```$", section, re.M | re.S)
    line = re.search(r'^```text\n( +"(\w+)": "(\w+):(\w+)",\n)```$', section, re.M)
    file = re.search(r"Save it as `(learners/\w+\.py)` and add to `LEARNERS` in `(learners/__init__\.py)`", section)
    assert code
    assert line
    assert file
    package = source / "efficientai_toolkit"
    assert file[1] == f"learners/{line[3]}.py"
    assert not (package / file[1]).exists()
    (package / file[1]).write_text(code[1], encoding="utf-8")
    table = (package / file[2]).read_text(encoding="utf-8")
    assert table.count("LEARNERS = {\n") == 1
    (package / file[2]).write_text(table.replace("LEARNERS = {\n", "LEARNERS = {\n" + line[1]), encoding="utf-8")
    return source, line[2], line[4]


def test_the_new_learner_is_known_trains_and_is_restored(edited, tmp_path):
    source, name, class_name = edited
    config = tmp_path / "config.yaml"
    config.write_text(
        f"meta_learning: {{algorithm: {name}, num_meta_iterations: 5}}\n"
        "task_distribution: {num_train_tasks: 8, num_val_tasks: 4}\n"
        "logging: {tensorboard_enabled: false}\n"
    )
    code = USE.replace("NAME", name).replace("CLASS", class_name)
    figures = run([sys.executable, "-c", code, str(source), str(config)], source, tmp_path)
    values = json.loads(figures.splitlines()[-1])
    assert values["after"] < 0.9 * values["before"]


def test_the_command_line_knows_it(edited, tmp_path):
    source, name, _ = edited
    program = [sys.executable, "-m", "efficientai_toolkit"]
    assert re.search(rf"^Learners: .*\b{name}\b", run([*program, "info"], source, tmp_path), re.M)
    train = ["meta-learning-peft:train", "--algorithm", name, "--iterations", "3", "--no-report"]
    run([*program, *train], source, tmp_path)


def test_the_contract_tests_take_it_up(edited, tmp_path):
    source, name, _ = edited
    matrix = ROOT / "tests" / "test_contract_matrix.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull]
    said = run([*command, str(matrix), "-k", name], source, tmp_path)
    assert int(re.search(r"(\d+) passed", said)[1]) > 3  # type: ignore[index]

"""CONTRIBUTING.md's two edits, made in a copy of the package, are all that a new learner, adapter or family takes."""

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


def edit(package: Path, kind: str, room: str, table: str) -> tuple[str, str]:
    """Make the two edits for a new `kind` in the copy `package`; its name in the table, and its class."""
    section = TEXT.partition(f"## Add {'an' if kind[0] in 'aeiou' else 'a'} {kind}")[2].partition("\n## ")[0]
    code = re.search(rf"<!-- test: {kind} -->\n```python\n(.*?)^```$", section, re.M | re.S)
    line = re.search(r'^```text\n( +"(\w+)": "(\w+):(\w+)",\n)```$', section, re.M)
    file = re.search(rf"Save it as `({room}/\w+\.py)` and add to `{table}` in `({room}/__init__\.py)`", section)
    assert code
    assert line
    assert file
    assert file[1] == f"{room}/{line[3]}.py"
    assert not (package / file[1]).exists()
    (package / file[1]).write_text(code[1], encoding="utf-8")
    text, count = re.subn(
        rf"^{table}\b.* = {{\n", lambda start: start[0] + line[1], (package / file[2]).read_text(), flags=re.M
    )
    assert count == 1
    (package / file[2]).write_text(text, encoding="utf-8")
    return line[2], line[4]


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> tuple[Path, str, str]:
    """A copy of `src/` with what CONTRIBUTING.md adds, and the name and class of its learner."""
    source = tmp_path_factory.mktemp("contributing") / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    package = source / "efficientai_toolkit"
    assert edit(package, "adapter", "adapters", "ADAPTERS") == ("input_scale", "InputScaleConfig")
    assert edit(package, "family", "tasks", "FAMILIES") == ("sawtooth", "Sawtooth")
    return source, *edit(package, "learner", "learners", "LEARNERS")


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
    new = ["--set", "adapter.method=input_scale", "--set", "task_distribution.task_families=sawtooth"]
    run([*program, *train, *new], source, tmp_path)


@pytest.mark.parametrize(
    ("tests", "which"),
    [
        ("contract_matrix", "NAME"),
        ("contract_matrix", "sawtooth and (reptile or fomaml or anil or r2d2)"),
        ("adapters_contract", "input_scale"),
    ],
)
def test_the_contract_tests_take_it_up(edited, tmp_path, tests, which):
    source, name, _ = edited
    file = ROOT / "tests" / f"test_{tests}.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull]
    said = run([*command, str(file), "-k", which.replace("NAME", name)], source, tmp_path)
    assert int(re.search(r"(\d+) passed", said)[1]) > 3  # type: ignore[index]


def test_without_editing_the_package(tmp_path):
    """The adapter and the family as files of a user's own: only the imports differ."""
    for kind, room in (("adapter", "adapters"), ("family", "tasks")):
        code = re.search(rf"<!-- test: {kind} -->\n```python\n(.*?)^```$", TEXT, re.M | re.S)
        assert code
        own = (
            code[1]
            .replace("from ..", "from efficientai_toolkit.")
            .replace("from .", f"from efficientai_toolkit.{room}.")
        )
        (tmp_path / f"my_{kind}.py").write_text(own, encoding="utf-8")
    use = (
        "from efficientai_toolkit import MLP, FOMAMLLearner, TaskConfig, TaskDistribution, attach\n"
        "from my_adapter import InputScaleConfig\n"
        "from my_family import Sawtooth\n"
        "learner = FOMAMLLearner(attach(MLP(1, 1, 8), InputScaleConfig()))\n"
        "assert learner.num_trainable < 30\n"
        "learner.meta_train(Sawtooth().distribution(), num_iterations=2)\n"
        "configs = [TaskConfig('a', 'sawtooth'), TaskConfig('b', 'sinusoid')]\n"
        "learner.meta_train(TaskDistribution(configs, families={'sawtooth': Sawtooth()}), num_iterations=2)\n"
    )
    run([sys.executable, "-c", use], ROOT / "src", tmp_path)

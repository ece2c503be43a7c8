"""What the report of the MeLPA experiment claims: memory, steps, intervals."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from matplotlib.container import BarContainer

from efficientai_toolkit import SimpleClassifier
from efficientai_toolkit.learners.melpa import MeLPALearner
from efficientai_toolkit.recipes.melpa import Sequence
from efficientai_toolkit.recipes.melpa_report import ablation, text

MASKS = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)


@pytest.fixture
def record() -> dict:
    return json.loads((Path(__file__).parents[1] / "benchmarks/records/continual/melpa.json").read_text())


@pytest.mark.parametrize(("initialisation", "update"), [("network", "rates"), ("fixed", "rates"), ("network", "fixed")])
def test_what_was_meta_learned_and_every_head_are_counted(initialisation, update):
    model = SimpleClassifier(2, 6, 2, 1, key=mx.random.key(1))
    learner = MeLPALearner(model, num_inner_steps=2, compile=False, initialisation=initialisation, update=update)
    agent = Sequence(learner, 2)
    rule = sum(array.size for array in learner.meta["rule"].values())
    assert rule > 0
    rng = np.random.default_rng(0)
    for number in range(2):
        agent.learn(rng.normal(size=(12, 2)).astype(np.float32), np.arange(12) % 2 + 2 * number, active=MASKS)
        assert agent.memory_bytes == 4 * (rule + number * (6 * 2 + 2))
    assert agent.num_parameters == learner.num_trainable


def test_the_last_step_is_measured_once():
    agent = Sequence(MeLPALearner(SimpleClassifier(2, 6, 2, 1), num_inner_steps=2, compile=False), 2)
    x, y, steps = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1]), []
    agent.learn(x, y, active=MASKS, each=steps.append)
    assert steps == [0, 1, 2]
    assert all(mx.array_equal(agent.params[path], array).item() for path, array in agent.heads[0].items())


def test_the_report_says_what_is_not_known_and_not_counted(record):
    said = text(record, {})
    assert "after which, at the latest, a new task reaches 90 %" in said
    assert "after 0, 1, 2, 3, 5, 10, 20, 40 steps" in said
    assert "all heads but one, are not counted" in said  # of the record that was made before
    assert "the two do not compare" in said
    for key, run in record["runs"].items():
        if key.startswith("melpa"):
            run["memory_bytes"] = 5
    assert "are not counted" not in text(record, {})


def test_intervals_of_two_seeds_are_shown(record):
    figure = ablation(record)
    for axis in figure.axes:
        bars = [c for c in axis.containers if isinstance(c, BarContainer)]
        assert len(bars) == 4
        low, high = axis.get_xlim()
        for bar in bars:
            ((begin, _), (end, _)) = bar.errorbar.lines[2][0].get_segments()[0]
            assert low <= begin < end <= high

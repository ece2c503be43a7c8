"""Long measurements over episodes go on where they were stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest

from efficientai_toolkit.recipes.intents import Episodes
from efficientai_toolkit.recipes.reproduce import episodes as module
from efficientai_toolkit.recipes.reproduce.episodes import BLOCK, EpisodeLog

EPISODES = Episodes(np.arange(50)[:, None], np.arange(50, 100)[:, None], 1)


class Measure:
    """Accuracy i / 100 of episode i; interrupted after so many calls."""

    def __init__(self, calls: int = 99):
        self.seen: list[int] = []
        self.calls = calls

    def __call__(self, some: Episodes) -> np.ndarray:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        assert np.array_equal(some.query - 50, some.support)
        self.seen += some.support[:, 0].tolist()
        return some.support[:, 0] / 100


@pytest.fixture(autouse=True)
def every_block(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)


def test_all_episodes_are_measured_in_order_and_told(tmp_path):
    lines: list[str] = []
    log = EpisodeLog(tmp_path / "log.json", {"row": "a"}, lines.append)
    accuracies, seconds = log.measure("5-way", Measure(), EPISODES)
    assert np.array_equal(accuracies, np.arange(50) / 100)
    assert seconds > 0
    assert lines[0] == "5-way: 10 of 50 episodes, accuracy 0.045"
    assert lines[-1] == "5-way: 50 of 50 episodes, accuracy 0.245"
    log.close()
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_not_measured_again(tmp_path):
    file = tmp_path / "log.json"
    with pytest.raises(KeyboardInterrupt):
        EpisodeLog(file, {"row": "a"}, print).measure("5-way", Measure(calls=2), EPISODES)
    rest = Measure()
    accuracies, seconds = EpisodeLog(file, {"row": "a"}, print).measure("5-way", rest, EPISODES)
    assert rest.seen == list(range(2 * BLOCK, 50))
    assert np.array_equal(accuracies, np.arange(50) / 100)
    assert seconds == json.loads(file.read_text())["kept"]["5-way"]["seconds"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocol": {"row": "b"}, "kept": {"5-way": 1}}'])
def test_a_log_of_another_protocol_or_none_is_begun_anew(tmp_path, text):
    file = tmp_path / "log.json"
    file.write_text(text)
    measure = Measure()
    EpisodeLog(file, {"row": "a"}, print).measure("5-way", measure, EPISODES)
    assert measure.seen == list(range(50))

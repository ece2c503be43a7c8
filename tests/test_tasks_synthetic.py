"""The synthetic families: what their settings do, and that their tasks can be learned."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientai_toolkit.errors import TaskSamplingError
from efficientai_toolkit.tasks.distribution import TaskConfig, TaskDistribution
from efficientai_toolkit.tasks.mixed_regression import SINE_LINE
from efficientai_toolkit.tasks.nonlinear import KINDS
from efficientai_toolkit.tasks.planar import balanced_labels
from efficientai_toolkit.tasks.sinusoid import SinusoidalTaskGenerator


def draw(kind: str, params: dict | None = None, *, ways: int = 2, dim: int = 2, support: int = 5, query: int = 1000):
    config = TaskConfig("task", kind, ways, dim, support, query, {"seed": 11} | (params or {}))
    return [np.array(part) for part in TaskDistribution([config]).sample_episode()[1:]]


@given(count=st.integers(1, 20), n=st.integers(1, 60), ways=st.integers(2, 10), seed=st.integers(0, 2**32))
def test_labels_are_balanced_to_within_one(count, n, ways, seed):
    labels = balanced_labels(count, n, ways, np.random.default_rng(seed))
    counts = np.apply_along_axis(np.bincount, 1, labels, minlength=ways)
    assert counts.max() - counts.min() <= 1
    assert labels.shape == (count, n)


def test_which_class_comes_once_more_and_the_order_are_random():
    labels = balanced_labels(6000, 5, 3, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(labels.ravel()) / labels.size, 1 / 3, atol=0.01)
    np.testing.assert_allclose(np.bincount(labels[:, 0]) / 6000, 1 / 3, atol=0.03)


def test_linear_classes_lie_on_two_sides_of_a_turned_and_shifted_line():
    angle, shift = 0.7, np.array([0.5, -2.0])
    _, _, x, y = draw("linear_classification", {"rotation_angle": angle, "translation": shift.tolist()})
    side = (x - shift) @ [np.cos(angle), np.sin(angle)]
    np.testing.assert_array_equal(side > 0, y == 0)
    np.testing.assert_allclose(x.std(0), 1, atol=0.08)


@pytest.mark.parametrize(("ways", "dim"), [(2, 2), (3, 10), (5, 2), (7, 4)])
def test_linear_classes_are_divided_by_hyperplanes(ways, dim):
    _, _, x, y = draw("linear_classification", {"translation": 0}, ways=ways, dim=dim, query=4000)
    np.testing.assert_allclose(np.bincount(y, minlength=ways) / len(y), 1 / ways, atol=1e-3)
    # Class means point along the sectors' centres, so the nearest of them is the class.
    means = np.stack([x[y == k].mean(0) for k in range(ways)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.mean((x @ means.T).argmax(1) == y) > 0.9
    np.testing.assert_allclose(np.cov(x.T), np.eye(dim), atol=0.12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ways", "dim"), [(2, 2), (3, 2), (3, 10)])
def test_nonlinear_classes_can_be_told_apart_but_not_by_a_hyperplane(kind, ways, dim):
    sx, sy, x, y = draw("nonlinear_classification", {"kind": kind}, ways=ways, dim=dim, support=3000, query=600)
    if dim > 2:  # the plane of the classes is where the points' shape is least normal; here it is known
        config = TaskConfig("task", "nonlinear_classification", ways, dim, 5, 5, {"seed": 11, "kind": kind})
        plane = TaskDistribution([config])._stacks[0].cells[0].tasks["plane"][0]
        np.testing.assert_allclose(plane.T @ plane, np.eye(2), atol=1e-12)
        sx, x = sx @ plane, x @ plane
    nearest = ((x[:, None] - sx[None]) ** 2).sum(-1).argmin(1)
    assert np.mean(sy[nearest] == y) > 0.93
    with_one = [np.hstack([part, np.ones((len(part), 1))]) for part in (sx, x)]
    weights = np.linalg.lstsq(with_one[0], np.eye(ways)[sy], rcond=None)[0]
    assert np.mean((with_one[1] @ weights).argmax(1) == y) < 0.9


def test_rotation_turns_and_translation_shifts():
    def centre(angle, shift=(0.0, 0.0)):
        _, _, x, y = draw(
            "nonlinear_classification",
            {"kind": "moons", "rotation_angle": angle, "translation": list(shift)},
            query=4000,
        )
        return x[y == 0].mean(0)

    base = centre(0.0)
    np.testing.assert_allclose(centre(np.pi / 2), [-base[1], base[0]], atol=0.06)
    np.testing.assert_allclose(centre(np.pi), -base, atol=0.06)
    np.testing.assert_allclose(centre(0.0, (3.0, -1.0)), base + np.array([3, -1]), atol=0.06)


@pytest.mark.parametrize(("ways", "noise"), [(2, 0.1), (2, 0.5), (4, 0.3)])
def test_label_noise_is_the_share_of_wrong_labels(ways, noise):
    settings = {"rotation_angle": 0.0, "translation": 0.0}
    _, _, x, y = draw("linear_classification", settings | {"label_noise": noise}, ways=ways, query=8000)
    angle = np.arctan2(x[:, 1], x[:, 0])
    true = np.round(angle / (2 * np.pi / ways)).astype(int) % ways
    assert abs(np.mean(true != y) - noise) < 0.02
    wrong = (y - true)[true != y] % ways
    np.testing.assert_allclose(np.bincount(wrong, minlength=ways)[1:] / len(wrong), 1 / (ways - 1), atol=0.03)


def test_kinds_are_drawn_from_the_seed():
    configs = [TaskConfig(f"t{i}", "nonlinear_classification") for i in range(400)]
    [stack] = TaskDistribution(configs)._stacks
    share = np.bincount(stack.cells[0].tasks["kind"]) / 400
    np.testing.assert_allclose(share, 0.25, atol=0.07)


def test_a_generator_samples_no_episode_of_its_distribution():
    """Who trains on the one and evaluates on the other does not evaluate on what was trained on."""
    generator, again = SinusoidalTaskGenerator(seed=0), SinusoidalTaskGenerator(seed=0)
    trained_on = [generator.distribution().batch_at(i, 25)[0].support_x for i in range(4)]
    sampled = [generator.sample_batch(25).support_x for _ in range(4)]
    assert not {x[0, 0, 0].item() for x in trained_on} & {x[0, 0, 0].item() for x in sampled}
    assert mx.array_equal(again.sample_batch(25).support_x, sampled[0])


def test_sinusoids_follow_finn():
    generator = SinusoidalTaskGenerator(support_size=10, query_size=500)
    stack = generator.sample_batch(400)
    x, y = np.array(stack.query_x), np.array(stack.query_y)
    assert stack.support_x.shape == (400, 10, 1)
    assert x.min() >= -5
    assert x.max() <= 5
    np.testing.assert_allclose(np.histogram(x, 10, (-5, 5))[0] / x.size, 0.1, atol=0.005)
    # Every task is a·sin x + b·cos x exactly, with amplitude √(a² + b²) in [0.1, 5] and phase in [0, π].
    waves = np.concatenate([np.sin(x), np.cos(x)], -1)
    solved = np.stack([np.linalg.lstsq(w, t, rcond=None)[0][:, 0] for w, t in zip(waves, y, strict=True)])
    np.testing.assert_allclose((waves @ solved[..., None]), y, atol=1e-4)
    amplitude, phase = np.hypot(*solved.T), np.arctan2(-solved[:, 1], solved[:, 0])
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, np.pi)):
        assert values.min() >= low - 1e-4
        assert values.max() <= high + 1e-4
        np.testing.assert_allclose(np.histogram(values, 4, (low, high))[0] / 400, 0.25, atol=0.08)


def test_settings_of_a_sinusoid():
    params = {"amplitude": 2.0, "phase": 0.5, "frequency": 3.0, "x_range": [0.0, 1.0]}
    sx, sy, x, y = draw("sinusoid", params)
    assert min(sx.min(), x.min()) >= 0
    assert x.max() <= 1
    np.testing.assert_allclose(y, 2 * np.sin(3 * x - 0.5), atol=1e-5)
    np.testing.assert_allclose(sy, 2 * np.sin(3 * sx - 0.5), atol=1e-5)
    _, _, x, y = draw("sinusoid", params | {"noise": 0.3}, query=5000)
    assert abs((y - 2 * np.sin(3 * x - 0.5)).std() - 0.3) < 0.02
    _, _, x, y = draw("sinusoid", params | {"amplitude": [4, 5]}, query=5000)
    assert 3.9 < np.abs(y).max() <= 5


class Steps(SinusoidalTaskGenerator):
    """A user's family."""

    ranges = {"height": (1.0, 2.0), "at": (-1.0, 1.0)}  # noqa: RUF012

    def function(self, x, p):
        return np.where(x > p["at"], p["height"], 0.0)


def test_a_user_extends_the_generator():
    generator = Steps(height=(3.0, 4.0), seed=5, support_size=20)
    episode = generator.sample_episode()
    assert [part.shape for part in episode] == [(20, 1), (20, 1), (10, 1), (10, 1)]
    y = np.array(generator.sample_batch(100).support_y)
    assert all(len(np.unique(task)) <= 2 for task in y)
    assert y.max() <= 4
    assert y[y > 0].min() >= 3
    tasks = Steps(seed=2).distribution(12)
    train, test = tasks.split_tasks()
    assert (len(train), len(test)) == (10, 2)
    assert mx.array_equal(
        Steps(seed=2).distribution().batch_at(4, 3)[0].query_y, Steps(seed=2).distribution().batch_at(4, 3)[0].query_y
    )
    with pytest.raises(TaskSamplingError, match=r"Steps has no parameter 'hieght'; did you mean 'height'\?"):
        Steps(hieght=3)
    with pytest.raises(TaskSamplingError, match="unknown task parameter 'amplitude'"):
        TaskDistribution([TaskConfig("a", "Steps", task_params={"amplitude": 2})], families={"Steps": Steps()})


def test_a_users_family_is_saved_by_name(tmp_path):
    tasks = Steps(seed=2).distribution(4)
    tasks.save(tmp_path / "steps.json")
    loaded = TaskDistribution.load(tmp_path / "steps.json", families={"Steps": Steps()})
    assert mx.array_equal(loaded.batch_at(0, 4)[0].query_y, tasks.batch_at(0, 4)[0].query_y)
    with pytest.raises(TaskSamplingError, match="unknown task family 'Steps'"):
        TaskDistribution.load(tmp_path / "steps.json")


def test_harmonics_are_two_waves_around_a_centre():
    _, _, x, y = draw("harmonic", {"frequency": 6.0}, query=400)
    waves = np.hstack([f(k * 6 * x) for f in (np.sin, np.cos) for k in (1, 2)])
    weights = np.linalg.lstsq(waves, y, rcond=None)[0]
    np.testing.assert_allclose(waves @ weights, y, atol=2e-4)
    assert abs(x.std() - 1) < 0.15
    configs = [TaskConfig(f"t{i}", "harmonic", query_size=100) for i in range(300)]
    centres = np.array(TaskDistribution(configs).batch_at(0, 300)[0].query_x).mean((1, 2))
    assert -4.5 < centres.min() < -3
    assert 3 < centres.max() < 4.5


def test_mixed_regression_has_its_three_kinds():
    configs = [TaskConfig(f"t{i}", "mixed_regression", query_size=60) for i in range(600)]
    tasks = TaskDistribution(configs)
    [stack] = tasks.batch_at(0, 600)
    x, y = np.array(stack.query_x, np.float64)[..., 0], np.array(stack.query_y)[..., 0]
    bases = {
        "line": lambda t: [t, np.ones_like(t)],
        "quadratic": lambda t: [t**2, t, np.ones_like(t)],
        "sine": lambda t: [np.sin(t), np.cos(t)],
    }
    counts = dict.fromkeys(bases, 0)
    for task_x, task_y in zip(x, y, strict=True):
        for name, basis in bases.items():
            waves = np.stack(basis(task_x), 1)
            weights, *_ = np.linalg.lstsq(waves, task_y, rcond=None)
            if np.abs(waves @ weights - task_y).max() < 1e-4:
                counts[name] += 1
                break
    assert sum(counts.values()) == 600
    np.testing.assert_allclose([n / 600 for n in counts.values()], 1 / 3, atol=0.06)


def test_the_sine_line_mix():
    config = TaskConfig("a", "mixed_regression", task_params=SINE_LINE)
    [stack] = TaskDistribution([config], endless=True)._stacks
    kind = stack.cells[0].family.tasks(
        config, {k: np.repeat(v, 1000, 0) for k, v in stack.cells[0].settings.items()}, np.arange(1000)
    )["kind"]
    np.testing.assert_allclose(np.bincount(kind, minlength=3) / 1000, [0.5, 0.5, 0], atol=0.04)
    _, _, x, y = draw("mixed_regression", {"kinds": "line", "noise": 0.3}, query=4000)
    residual = y - np.polyval(np.polyfit(x[:, 0], y[:, 0], 1), x)
    assert abs(residual.std() - 0.3) < 0.02

"""Batch norm by the support's statistics: an adapted model's answer does not depend on what else is asked."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from efficientai_toolkit import Conv4, EpisodeStack, learner_class, trainable
from efficientai_toolkit.config import MetaLearningConfig
from efficientai_toolkit.nn.layers import EpisodicBatchNorm
from efficientai_toolkit.nn.losses import cross_entropy_loss
from efficientai_toolkit.nn.statistics import by_module, by_path, given, keep, recorded
from efficientai_toolkit.runs.adapted import AdaptedTask, adapt_checkpoint
from efficientai_toolkit.runs.build import checkpoint_file
from efficientai_toolkit.runs.loaded import load_learner
from efficientai_toolkit.runs.train import train
from learner_cases import singles

LEARNERS = ("maml", "anil", "maml++", "cavia", "leo", "protonet", "matching", "relation", "r2d2", "baseline++")


def characters(tasks: int = 3) -> EpisodeStack:
    """Patterns of a class under noise of its own."""
    rng = np.random.default_rng(0)
    patterns = rng.random((tasks, 3, 1, 8, 8, 1))
    x = (patterns + 0.3 * rng.standard_normal((tasks, 3, 6, 8, 8, 1))).astype(np.float32)
    x = [mx.array(part.reshape(tasks, -1, 8, 8, 1)) for part in (x[:, :, :2], x[:, :, 2:])]
    y = [mx.array(np.tile(np.repeat(np.arange(3), n), (tasks, 1))) for n in (2, 4)]
    return EpisodeStack(x[0], y[0], x[1], y[1])


def make(name: str, **options):
    model = Conv4((8, 8, 1), 3, hidden_dim=4, num_layers=2, key=mx.random.key(4))
    return learner_class(name)(model, inner_lr=0.05, num_inner_steps=2, **options)


def one_by_one(model, x: mx.array) -> mx.array:
    return mx.concatenate([model(x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("name", LEARNERS)
def test_an_adapted_model_answers_one_by_one_as_it_does_all_at_once(name):
    learner, task = make(name), singles(characters())[0]
    adapted = learner.adapt(task.support_x, task.support_y)
    np.testing.assert_allclose(one_by_one(adapted, task.query_x), adapted(task.query_x), atol=2e-4)
    # The learner itself, and the next task that it adapts to, know nothing of this one's statistics.
    assert not any("_moments" in module for module in learner.model.modules())
    again = learner.adapt(task.support_x, task.support_y)
    np.testing.assert_allclose(again(task.query_x), adapted(task.query_x), atol=1e-6)


@pytest.mark.parametrize("name", ["maml", "protonet", "r2d2"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_evaluation_without_transduction_is_that_of_adapted_models(name, chunk):
    learner, tasks = make(name, chunk=chunk), characters()
    losses = {
        flag: learner.evaluate_per_task(tasks, None, (0, 2), transductive=flag)["step_2_loss"] for flag in (True, False)
    }
    expected = [
        cross_entropy_loss(one_by_one(learner.adapt(t.support_x, t.support_y), t.query_x), t.query_y).item()
        for t in singles(tasks)
    ]
    np.testing.assert_allclose(losses[False], expected, rtol=1e-3)
    assert np.abs(losses[True] - losses[False]).max() > 0.01


def test_the_statistics_are_those_of_the_batch_and_can_be_named():
    model = Conv4((8, 8, 1), 3, hidden_dim=4, num_layers=2)
    x, other = (mx.random.normal((5, 8, 8, 1), key=mx.random.key(i)) for i in (1, 2))
    with recorded() as seen:
        y = model(x)
    named = by_path(model, seen)
    norms = [path for path, module in model.named_modules() if isinstance(module, EpisodicBatchNorm)]
    assert sorted(named) == sorted(f"{path}.{name}" for path in norms for name in ("mean", "variance"))
    with given(by_module(model, named)):
        np.testing.assert_allclose(model(mx.concatenate([x, other]))[:5], y, atol=1e-5)
    assert mx.abs(model(mx.concatenate([x, other]))[:5] - y).max().item() > 1e-3
    keep(model, seen)
    np.testing.assert_allclose(model(x[:1]), y[:1], atol=1e-5)
    assert not any("_moments" in path for path in trainable(model))


def test_predict_answers_an_image_alone_as_among_others(tmp_path):
    """Through a checkpoint, `adapt` and the folder that it writes."""
    rng = np.random.default_rng(0)
    for label in range(12):
        pattern = rng.random((16, 16))
        folder = tmp_path / "images" / "image_folder" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(pattern + 0.1 * rng.standard_normal((16, 16)), 0, 1)
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{number}.png")
    config = MetaLearningConfig.from_dict(
        {
            "meta_learning": {"algorithm": "protonet", "num_meta_iterations": 3, "meta_batch_size": 2},
            "task_distribution": {
                "task_families": ["image_folder"],
                "n_way": 2,
                "k_shot": 2,
                "query_per_class": 2,
                "num_val_tasks": 2,
                "task_params": {"image_size": 16},
            },
            "model": {"backbone": "conv4", "hidden_dim": 4, "num_layers": 2},
            "paths": {"data_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "runs")},
            "logging": {"tensorboard_enabled": False},
        }
    )
    file = checkpoint_file(train(config)["run"])
    x = rng.random((8, *load_learner(file).input_shape)).astype(np.float32)
    adapted = adapt_checkpoint(file, x[:4], ["a", "a", "b", "b"])
    adapted.save(tmp_path / "mine")
    again = AdaptedTask.load(tmp_path / "mine")
    together = np.array(adapted.outputs(x))
    alone = np.concatenate([again.outputs(x[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(alone, together, atol=1e-4)
    assert sum(name.startswith("statistics/") for name in np.load(tmp_path / "mine" / "adapted.npz")) == 4

"""Every learner on every synthetic family: it learns, a stack is a loop, compiled is eager, frozen weights stay.

The tables `LEARNERS` and `FAMILIES` are what is iterated over: a new entry is tested the day it is added.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from efficientai_toolkit import MLP, SimpleClassifier, TaskConfig, TaskDistribution, ToolkitError, learner_class
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.nn.layers import Dropout
from efficientai_toolkit.tasks import FAMILIES, family

SYNTHETIC = [name for name in FAMILIES if not family(name).way_and_shot]
# Learners for one kind of target only. They must say so in one sentence.
CLASSES_ONLY = {"proto_maml", "protonet", "matching", "relation", "baseline++"}
NUMBERS_ONLY = {"alpaca"}
# Rates at which 50 steps show learning, by kind of target; and where a learner's own differ.
RATES = {
    "classification": {"inner_lr": 0.02, "outer_lr": 0.005, "num_inner_steps": 3},
    "regression": {"inner_lr": 0.005, "outer_lr": 0.003, "num_inner_steps": 2, "gradient_clip": 10.0},
}
OWN: dict[tuple[str, str], dict] = {
    ("reptile", "classification"): {"inner_lr": 0.05, "outer_lr": 0.01},
    ("imaml", "classification"): {"inner_lr": 0.05},
    ("reptile", "regression"): {"inner_lr": 0.001},
    ("fomaml", "regression"): {"inner_lr": 0.001},
    ("imaml", "regression"): {"inner_lr": 0.0005},  # at 0.001 two steps on a harmonic overshoot after some training
    ("alpaca", "regression"): {"noise": 1.0},
    ("leo", "regression"): {"decodes": "all", "inner_lr": 0.003, "finetune_steps": 0},
    ("meta_sgd", "regression"): {"rate_range": (0.0005, 0.002)},
}


def distribution(name: str, seed: int = 0, **sizes) -> TaskDistribution:
    sizes = {"support_size": 10, "query_size": 15, **sizes}
    config = TaskConfig("template", name, num_classes=2, input_dim=2 if family(name).classification else 1, **sizes)
    return TaskDistribution([config], seed, endless=True, stream=f"matrix {seed}")


def build(algorithm: str, tasks: TaskDistribution, **arguments):
    if tasks.is_classification:
        model = SimpleClassifier(tasks.input_shape[0], 16, tasks.output_dim)
    else:
        model = MLP(tasks.input_shape[0], tasks.output_dim, 16)
    kind = "classification" if tasks.is_classification else "regression"
    return learner_class(algorithm)(model, **{**RATES[kind], **OWN.get((algorithm, kind), {}), **arguments})


def fits(algorithm: str, classification: bool) -> bool:
    return algorithm not in (NUMBERS_ONLY if classification else CLASSES_ONLY)


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_it_learns(algorithm, name):
    """50 meta-steps lower the held-out query loss, and adaptation lowers the support loss."""
    tasks, held_out = distribution(name), distribution(name, seed=1).batch_at(0, 100)
    if not fits(algorithm, tasks.is_classification):
        with pytest.raises(ToolkitError, match=r"class|regression|target"):
            build(algorithm, tasks, compile=False).evaluate(tasks.batch_at(0, 2))
        with pytest.raises(ToolkitError, match=r"class|regression|target"):
            build(algorithm, tasks, compile=False).meta_train_step(tasks.batch_at(0, 2))
        return
    learner = build(algorithm, tasks, compile=False)
    trained = learner.num_inner_steps
    on_support = [stack._replace(query_x=stack.support_x, query_y=stack.support_y) for stack in held_out]
    start = learner.evaluate(held_out, num_adaptation_steps=(trained,))[f"step_{trained}_loss"]
    for iteration in range(50):
        learner.meta_update(tasks.batch_at(iteration, 8))
    end = learner.evaluate(held_out, num_adaptation_steps=(trained,))[f"step_{trained}_loss"]
    assert end < start
    adapted = learner.evaluate(on_support, num_adaptation_steps=(0, trained))
    if learner.adapts_by_steps:
        assert adapted[f"step_{trained}_loss"] < adapted["step_0_loss"]
    elif tasks.is_classification:
        assert adapted[f"step_{trained}_acc"] > 0.6


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_stack_is_loop_and_compiled_is_eager(algorithm):
    name = "linear_classification" if fits(algorithm, True) else "sinusoid"
    tasks = distribution(name, support_size=6, query_size=6)
    batch = tasks.batch_at(0, 3)
    reference = build(algorithm, tasks, chunk=3, compile=False).meta_gradient(batch)
    for arguments in ({"chunk": 1, "compile": False}, {"chunk": 3, "compile": True}):
        metrics, grads = build(algorithm, tasks, **arguments).meta_gradient(batch)
        assert grads.keys() == reference[1].keys()
        for path, expected in reference[1].items():
            scale = max(mx.linalg.norm(expected.reshape(-1)).item(), 1e-2)
            assert mx.linalg.norm((grads[path] - expected).reshape(-1)).item() <= 1e-4 * scale, path
        assert mx.allclose(metrics["query_loss"], reference[0]["query_loss"], rtol=1e-5)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_frozen_weights_stay_and_trees_are_kept(algorithm):
    name = "linear_classification" if fits(algorithm, True) else "sinusoid"
    tasks = distribution(name, support_size=6, query_size=6)
    learner = build(algorithm, tasks, compile=False)
    before = {path: (value.shape, value.dtype) for path, value in learner.state().items()}
    metrics = learner.meta_train_step(tasks.batch_at(0, 3))
    assert {path: (value.shape, value.dtype) for path, value in learner.state().items()} == before
    assert all(value == value and abs(value) != float("inf") for value in metrics.values())
    frozen = build(algorithm, tasks, compile=False)
    frozen._model.layers[0].freeze()
    partly = type(frozen)(frozen._model, num_inner_steps=2, compile=False, **frozen.options)
    kept = mx.array(frozen._model.layers[0].weight)
    partly.meta_train_step(tasks.batch_at(0, 3))
    assert mx.array_equal(partly.model.layers[0].weight, kept)
    assert not any(path.startswith("model/layers.0") for path in partly.state())


class Dropped(nn.Module):
    """A small network with dropout between its layers."""

    def __init__(self, p: float, outputs: int, inputs: int):
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(inputs, 16), Dropout(p), nn.Linear(16, outputs)

    def features(self, x):
        return self.drop(nn.relu(self.first(x)))

    def __call__(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("algorithm", [name for name in LEARNERS if not learner_class(name).adapts_by_steps])
def test_no_dropout_where_nothing_is_trained(algorithm):
    """Evaluation and adaptation in closed form are those of the same weights without dropout; meta-training is not."""
    tasks = distribution("linear_classification" if fits(algorithm, True) else "sinusoid")
    batch = tasks.batch_at(0, 4)
    plain, dropped = (Dropped(p, tasks.output_dim, tasks.input_shape[0]) for p in (0.0, 0.5))
    dropped.update(plain.parameters())
    one, other = (learner_class(algorithm)(model, compile=False) for model in (plain, dropped))
    assert other.evaluate(batch, num_adaptation_steps=(0, 1)) == one.evaluate(batch, num_adaptation_steps=(0, 1))
    sx, sy, qx, _ = (part[0] for part in batch[0])
    assert mx.array_equal(other.adapt(sx, sy)(qx), one.adapt(sx, sy)(qx))
    assert other.meta_gradient(batch)[0]["query_loss"].item() != one.meta_gradient(batch)[0]["query_loss"].item()

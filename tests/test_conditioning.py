"""Duplicates, large inputs, rows of zeros: closed forms that would divide by nothing."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import MLP, DoRAConfig, SimpleClassifier, attach, learner_class, merge
from efficientai_toolkit.learners.r2d2 import regularized, solve_spd
from learner_cases import blobs, sines


def all_finite(learner, stack) -> bool:
    metrics, grads = learner.meta_gradient(stack)
    values = [*metrics.values(), *grads.values()]
    return all(mx.all(mx.isfinite(value)).item() for value in values)


def repeated(stack):
    """Every example of the support twice over."""
    double = {name: mx.repeat(getattr(stack, name), 2, axis=1) for name in ("support_x", "support_y")}
    return stack._replace(**double)


def larger(stack, factor):
    return stack._replace(support_x=factor * stack.support_x, query_x=factor * stack.query_x)


@pytest.mark.parametrize("factor", [1, 1e3, 1e5])
def test_r2d2_is_finite_on_duplicates_and_on_large_inputs(factor):
    stack = larger(repeated(blobs(2)), factor)
    learner = learner_class("r2d2")(SimpleClassifier(hidden_dim=16, num_classes=3), strength=1e-6)
    assert all_finite(learner, stack)
    logits = learner.adapt(stack.support_x[0], stack.support_y[0])(stack.support_x[0])
    assert mx.array_equal(mx.argmax(logits, axis=-1), stack.support_y[0]).item()  # and right about what it has seen


@pytest.mark.parametrize("factor", [1, 1e3, 1e5])
@pytest.mark.parametrize("name", ["r2d2", "alpaca"])
def test_regression_in_closed_form_is_finite_on_duplicates_and_on_large_inputs(name, factor):
    options = {"strength": 1e-6} if name == "r2d2" else {"noise": 1e-6}
    stack = larger(repeated(sines(2)), factor)
    learner = learner_class(name)(MLP(hidden_dim=16), **options)
    assert all_finite(learner, stack)
    assert mx.all(mx.isfinite(learner.adapt(stack.support_x[0], stack.support_y[0])(stack.query_x[0]))).item()


@pytest.mark.parametrize("n", [10, 50, 100])
def test_the_least_ridge_lets_the_elimination_end_near_the_solution(n):
    rng = np.random.default_rng(n)
    features = 1e3 * rng.standard_normal((n, 3)) @ rng.standard_normal((3, 40))  # rank 3
    gram = mx.array((features @ features.T).astype(np.float32))
    right = mx.array(rng.standard_normal((n, 2)).astype(np.float32))
    system = regularized(gram, mx.array(1e-6))
    exact = np.linalg.solve(np.array(system, np.float64), np.array(right, np.float64))
    assert np.abs(np.array(solve_spd(system, right)) - exact).max() <= 0.2 * np.abs(exact).max()


def test_an_ordinary_ridge_is_left_alone():
    gram = mx.array([[4.0, 1.0], [1.0, 2.0]])
    assert mx.array_equal(regularized(gram, mx.array(0.1)), gram + 0.1 * mx.eye(2)).item()


def test_dora_takes_a_row_of_zeros():
    model, x = nn.Sequential(nn.Linear(4, 3)), mx.random.normal((5, 4), key=mx.random.key(0))
    model.layers[0].weight[1] = 0
    expected = model(x)
    attach(model, DoRAConfig(rank=2, dropout=0.0), "linear")
    np.testing.assert_allclose(np.array(model(x)), np.array(expected), atol=1e-6)
    step = nn.value_and_grad(model, lambda model: mx.mean(mx.square(model(x) - 1)))
    assert step(model)[1]["layers"][0]["adapters"]["default"]["lora_b"][:, 1].abs().max().item() > 0
    adapter = model.layers[0].adapters["default"]
    adapter.lora_b, adapter.m = mx.ones((2, 3)), adapter.m + mx.array([0.0, 0.5, 0.0])
    before = model(x)
    np.testing.assert_allclose(np.array(merge(model)(x)), np.array(before), atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("leo", {"decodes": "all"}), ("alpaca", {}), ("r2d2", {})])
def test_a_frozen_head_is_enough_for_regression(name, options):
    model, stack = MLP(hidden_dim=8), sines(2)
    model.freeze()
    model.layers[0].unfreeze()
    head = model.head.weight
    learner = learner_class(name)(model, num_inner_steps=1, **options)
    first = learner.meta_train_step(stack)["query_loss"]
    for _ in range(10):
        last = learner.meta_train_step(stack)["query_loss"]
    assert last < first
    assert not [path for path in learner.meta["model"] if path.startswith("head.")]
    assert mx.array_equal(learner.model.head.weight, head).item()


def test_the_prior_s_mean_is_the_head_trained_or_frozen():
    stack, found = sines(1), []
    for frozen in (False, True):
        model = MLP(hidden_dim=8)
        if frozen:
            model.head.freeze()
        learner = learner_class("alpaca")(model)
        found.append(learner.adapt(stack.support_x[0], stack.support_y[0])(stack.query_x[0]))
    assert mx.array_equal(*found).item()

"""Learners that differ from MAML in their update rule or outer loss: where they must be MAML, and where not."""

from __future__ import annotations

import io

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import MLP, Conv4, MAMLLearner, SimpleClassifier, learner_class, trainable
from efficientai_toolkit.learners.maml_pp import step_weights
from efficientai_toolkit.learners.meta_curvature import curvature
from efficientai_toolkit.learners.update_rules import sgd
from learner_cases import assert_close, blobs, model_part, sines

SWITCHED_OFF = {"lslr": False, "multi_step_iterations": 0, "per_step_norm": False}
LIKE_MAML = {
    "meta_sgd": {"rate_range": (0.05, 0.05)},
    "lslr": {},
    "maml++": SWITCHED_OFF,
    "meta_curvature": {},
    "maml_enhanced": {"kind": "mc1"},
}


@pytest.mark.parametrize("name", LIKE_MAML)
def test_at_its_neutral_setting_it_is_maml(name):
    stack = sines(3)
    learner = learner_class(name)(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2, **LIKE_MAML[name])
    metrics, grads = learner.meta_gradient(stack)
    expected_metrics, expected = MAMLLearner(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2).meta_gradient(stack)
    assert_close(model_part(grads), expected)
    assert_close(metrics, expected_metrics)


@pytest.mark.parametrize("name", [name for name in LIKE_MAML if name != "maml++"])
def test_the_gradient_of_the_rule_is_that_of_the_query_loss(name):
    """A step of the rule's arrays against their gradient changes the loss by the product of the two."""
    stack, options = sines(2), LIKE_MAML[name]
    learner = learner_class(name)(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2, **options)
    before, grads = learner.meta_gradient(stack)
    rule = {name: g for name, g in grads.items() if name.startswith("rule/")}
    square = sum(mx.sum(g * g).item() for g in rule.values())
    assert square > 0
    step = 1e-3 / square
    arrays = learner.state()
    learner.load_state({n: a - step * rule[n] if n in rule else a for n, a in arrays.items()})
    after, _ = learner.meta_gradient(stack)
    assert (before["query_loss"] - after["query_loss"]).item() == pytest.approx(1e-3, rel=0.03)


def test_conv_curvature_is_the_three_mode_product():
    rng = np.random.default_rng(0)
    g = rng.standard_normal((4, 3, 3, 2)).astype(np.float32)
    m = {mode: rng.standard_normal((n, n)).astype(np.float32) for mode, n in (("out", 4), ("filter", 9), ("in", 2))}
    expected = np.einsum("ao,bf,ci,ofi->abc", m["out"], m["filter"], m["in"], g.reshape(4, 9, 2)).reshape(g.shape)
    rule = {f"{mode}.w": mx.array(matrix) for mode, matrix in m.items()}
    update = curvature(sgd(0.5), ("in", "filter", "out")).update
    moved, _ = update(rule, {}, {"w": mx.array(g)}, {"w": mx.zeros(g.shape)}, 0)
    np.testing.assert_allclose(np.array(moved["w"]), -0.5 * expected, atol=1e-5)


def test_curvature_has_one_matrix_a_mode():
    model = Conv4((8, 8, 1), 3, hidden_dim=4, num_layers=2)
    arrays = {name: tuple(a.shape) for name, a in learner_class("meta_curvature")(model).meta["rule"].items()}
    assert arrays["filter.blocks.0.conv.weight"] == (9, 9)
    assert arrays["out.blocks.1.conv.weight"] == arrays["in.blocks.1.conv.weight"] == (4, 4)
    assert arrays["scale.head.bias"] == (3,)
    assert "filter.head.weight" not in arrays
    one_sided = learner_class("meta_curvature")(model, kind="mc1").meta["rule"]
    assert not any(name.startswith("out.") for name in one_sided)


def test_meta_sgd_draws_its_rates_uniformly():
    rates = learner_class("meta_sgd")(MLP()).meta["rule"]
    drawn = np.concatenate([np.array(rate).ravel() for rate in rates.values()])
    assert drawn.min() >= 0.005
    assert drawn.max() <= 0.1
    assert drawn.mean() == pytest.approx(0.0525, abs=0.003)


def test_per_step_rates_repeat_beyond_the_trained_steps():
    stack = sines(2)
    learner = learner_class("lslr")(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2)
    rates = {n: mx.array([0.05, 0.02]) for n in learner.meta["rule"]}
    learner.load_state(learner.state() | {f"rule/{n}": r for n, r in rates.items()})
    four = learner.adapt(stack.support_x[0], stack.support_y[0], num_steps=4)
    two = learner.adapt(stack.support_x[0], stack.support_y[0], num_steps=2)
    rest = MAMLLearner(two, inner_lr=0.02).adapt(stack.support_x[0], stack.support_y[0], num_steps=2)
    assert_close(trainable(four), trainable(rest))
    assert learner_class("lslr").per_step_rule


def test_multi_step_loss_goes_from_the_mean_to_the_last_step():
    np.testing.assert_allclose(np.array(step_weights(mx.array(0.0), 4)), [0.25] * 4, atol=1e-6)
    np.testing.assert_allclose(np.array(step_weights(mx.array(2.0), 4)), [0.0075] * 3 + [0.9775], atol=1e-6)
    stack = sines(2)
    options = SWITCHED_OFF | {"multi_step_iterations": 10}
    learner = learner_class("maml++")(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=3, **options)
    each = [MAMLLearner(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=k).meta_gradient(stack)[1] for k in (1, 2, 3)]
    mean = {name: sum(g[name] for g in each) / 3 for name in each[0]}
    assert_close(learner.meta_gradient(stack)[1], mean)
    learner.iteration = 9
    weights = step_weights(mx.array(0.9), 3).tolist()
    late = {name: sum(w * g[name] for w, g in zip(weights, each, strict=True)) for name in mean}
    assert_close(learner.meta_gradient(stack)[1], late)
    learner.iteration = 10
    assert_close(learner.meta_gradient(stack)[1], each[2])


def test_derivative_order_is_annealed():
    stack = sines(2)
    options = SWITCHED_OFF | {"first_order_iterations": 5}
    learner = learner_class("maml++")(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2, **options)
    for iteration, first_order in ((0, True), (4, True), (5, False)):
        learner.iteration = iteration
        same = MAMLLearner(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2, first_order=first_order)
        assert_close(learner.meta_gradient(stack)[1], same.meta_gradient(stack)[1])


def test_after_its_phases_maml_pp_costs_what_maml_does():
    """Operations of a meta-step: more with the multi-step loss, fewer in first order."""
    counts = []
    for several, first, iteration in ((5, 0, 0), (5, 0, 5), (0, 5, 0), (0, 5, 5), (0, 0, 0)):
        options = SWITCHED_OFF | {"multi_step_iterations": several, "first_order_iterations": first, "compile": False}
        learner = learner_class("maml++")(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=3, **options)
        learner.iteration = iteration
        counts.append(operations(learner.meta_update([sines(2)])["grad_norm"]))
    multi_step, last_step, first_order, second_order, maml = counts
    assert multi_step > last_step == second_order == maml > first_order


def operations(*arrays: mx.array) -> int:
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")


def test_norms_have_their_own_affine_for_every_step():
    model = Conv4((8, 8, 1), 2, hidden_dim=4, num_layers=2)
    options = SWITCHED_OFF | {"per_step_norm": True}
    learner = learner_class("maml++")(model, inner_lr=0.1, num_inner_steps=2, **options)
    path = "blocks.0.norm.weight"
    assert learner.meta["rule"][f"step.{path}"].shape == (2, 4)
    own = learner.meta["rule"] | {f"step.{path}": mx.array([[1.0] * 4, [1.5] * 4])}
    learner.load_state(learner.state() | {f"rule/{n}": a for n, a in own.items()})
    x = mx.random.uniform(shape=(6, 8, 8, 1), key=mx.random.key(1))
    y = mx.array([0, 1, 0, 1, 0, 1])
    for steps, value in ((0, 1.0), (1, 1.0), (2, 1.5), (5, 1.5)):
        adapted = trainable(learner.adapt(x, y, num_steps=steps))
        assert mx.array_equal(adapted[path], mx.full((4,), value))
    assert not mx.array_equal(adapted["head.weight"], trainable(model)["head.weight"])


def test_cosine_schedule_lowers_the_outer_rate():
    stack = sines(2)
    learner = learner_class("maml++")(MLP(hidden_dim=8), outer_lr=0.01, cosine_iterations=4, outer_optimizer="sgd")
    moves = []
    for _ in range(5):
        metrics = learner.meta_train_step(stack)
        moves.append(metrics["param_diff"] / metrics["grad_norm"])
    expected = [0.0001 + 0.0099 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(5)]
    assert moves == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["meta_sgd", "maml++", "meta_curvature", "maml_enhanced"])
def test_fifty_steps_lower_the_held_out_loss(name):
    learner = learner_class(name)(SimpleClassifier(hidden_dim=16, num_classes=3), inner_lr=0.02, outer_lr=0.01)
    held_out = blobs(20, seed=99)
    before = learner.evaluate(held_out, num_adaptation_steps=(5,))["step_5_loss"]
    for i in range(50):
        learner.meta_train_step(blobs(4, seed=i))
    assert learner.evaluate(held_out, num_adaptation_steps=(5,))["step_5_loss"] < 0.8 * before


def test_the_supports_loss_costs_nothing_where_it_is_not_asked_for():
    counts, updated = [], []
    for asked in (True, False):
        learner = MAMLLearner(MLP(hidden_dim=8), inner_lr=0.05, num_inner_steps=2)
        metrics = learner.meta_update([sines(2)], support_loss=asked)
        assert ("support_loss" in metrics) == asked
        counts.append(operations(*metrics.values()))
        updated.append(learner.meta["model"])
    assert counts[0] > counts[1]
    assert_close(updated[0], updated[1])

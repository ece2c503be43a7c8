"""R2-D2, ALPaCA, iMAML, CAVIA and LEO against closed forms and hand computations."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import (
    MLP,
    ConfigurationError,
    Conv4,
    SimpleClassifier,
    TaskSamplingError,
    functional,
    learner_class,
    mse_loss,
    trainable,
)
from efficientai_toolkit.learners import inner_loop as loop
from efficientai_toolkit.learners.alpaca import posterior
from efficientai_toolkit.learners.cavia import modulated_paths
from efficientai_toolkit.learners.imaml import conjugate_gradient, proximal_sgd
from efficientai_toolkit.learners.leo import Target, decorrelation, encode, kl_to_standard_normal
from efficientai_toolkit.learners.r2d2 import ridge, solve_spd, with_one
from efficientai_toolkit.nn.functional import next_key
from learner_cases import assert_close, blobs, sines, singles


def spd(n: int, seed: int = 0) -> np.ndarray:
    """Symmetric positive definite, condition number 100."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (q * np.geomspace(0.1, 10, n)) @ q.T


# --- R2-D2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 25])
def test_solve_agrees_with_float64_and_so_does_its_gradient(n):
    a, b = spd(n), np.random.default_rng(1).standard_normal((n, 3))
    exact = np.linalg.solve(a, b)
    solved = solve_spd(mx.array(a, dtype=mx.float32), mx.array(b, dtype=mx.float32))
    assert np.abs(np.array(solved) - exact).max() <= 2e-5 * np.abs(exact).max()
    weights = np.random.default_rng(2).standard_normal((n, 3))

    def objective(a, b):
        return mx.sum(mx.array(weights, dtype=mx.float32) * solve_spd(a, b))

    grads = mx.grad(objective, argnums=(0, 1))(mx.array(a, dtype=mx.float32), mx.array(b, dtype=mx.float32))
    by_b = np.linalg.solve(a, weights)  # d/dB tr(Wᵀ A⁻¹ B) = A⁻ᵀ W, and d/dA = −A⁻ᵀ W Xᵀ
    for found, expected in zip(grads, (-by_b @ exact.T, by_b), strict=True):
        assert np.linalg.norm(np.array(found) - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(("size", "width"), [(5, 20), (20, 5), (6, 6)])
def test_ridge_is_the_normal_equations_whichever_side_is_solved(size, width):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((size, width)), rng.standard_normal((size, 2))
    exact = np.linalg.solve(x.T @ x + 0.3 * np.eye(width), x.T @ y)
    found = ridge(*(mx.array(v, dtype=mx.float32) for v in (x, y)), mx.array(0.3))
    assert np.abs(np.array(found) - exact).max() <= 1e-5 * max(1, np.abs(exact).max())


def test_r2d2_is_ridge_on_the_features():
    model, task = SimpleClassifier(hidden_dim=8, num_classes=3), singles(blobs(1))[0]
    learner = learner_class("r2d2")(model, strength=0.5)
    x, q = (np.array(with_one(model.features(part)), np.float64) for part in (task.support_x, task.query_x))
    y = np.eye(6)[np.array(task.support_y)]
    expected = 10 * q @ np.linalg.solve(x.T @ x + 0.5 * np.eye(9), x.T @ y)
    logits = np.array(learner.adapt(task.support_x, task.support_y)(task.query_x))
    np.testing.assert_allclose(logits[:, :3], expected[:, :3], atol=1e-4)
    assert (logits[:, 3:] < logits[:, :3].min() - 10).all()  # classes without support are ruled out


# --- ALPaCA ----------------------------------------------------------------------------------------------------------


def test_the_posterior_is_bayes_rule():
    rng = np.random.default_rng(0)
    phi, y, mean = rng.standard_normal((4, 6)), rng.standard_normal((4, 1)), rng.standard_normal((6, 1))
    factor, noise = rng.standard_normal((6, 6)) + 2 * np.eye(6), 0.3
    precision = np.linalg.inv(factor @ factor.T)
    covariance = np.linalg.inv(precision + phi.T @ phi / noise)
    expected = covariance @ (precision @ mean + phi.T @ y / noise)
    arrays = (mx.array(v, dtype=mx.float32) for v in (phi, y, mean, factor, noise))
    found_mean, found_covariance = posterior(*arrays)
    np.testing.assert_allclose(np.array(found_mean), expected, atol=1e-4)
    np.testing.assert_allclose(np.array(found_covariance), covariance, atol=1e-4)


def test_alpaca_is_unsure_where_it_has_seen_nothing():
    learner = learner_class("alpaca")(MLP(hidden_dim=16), outer_lr=0.01, noise=0.01)
    for i in range(30):
        learner.meta_train_step(sines(8, seed=i))
    x = mx.array([[0.0], [0.1], [-0.1]])
    mean, variance = learner.predict_distribution(x, mx.sin(x), mx.array([[0.05], [3.0]]))
    assert mean.shape == variance.shape == (2, 1)
    assert variance[1].item() > 10 * variance[0].item() > 0
    with pytest.raises(TaskSamplingError, match="regression"):
        learner.adapt(x, mx.array([0, 1, 1]))


# --- iMAML -----------------------------------------------------------------------------------------------------------


def quadratic(seed: int = 0):
    """A linear model on a quadratic loss: everything about iMAML has a closed form."""
    rng = np.random.default_rng(seed)
    model = nn.Linear(3, 1, bias=False)
    model.weight = mx.array(rng.standard_normal((1, 3)).astype(np.float32))
    sx, qx = rng.standard_normal((1, 5, 3)), rng.standard_normal((1, 7, 3))
    sy, qy = rng.standard_normal((1, 5, 1)), rng.standard_normal((1, 7, 1))
    return model, [sx, sy, qx, qy]


def test_alpaca_s_likelihood_drops_features_of_support_and_query_alike():
    calls = []

    class Noting(nn.Module):
        def __call__(self, x):
            calls.append((x.shape[0], next_key() is not None))
            return mx.tanh(x)

    model = nn.Sequential(nn.Linear(1, 8), Noting(), nn.Linear(8, 1))
    learner_class("alpaca")(model, chunk=1, compile=False).meta_gradient(sines(1))
    rows = {active: [n for n, drops in calls if drops == active] for active in (True, False)}
    assert rows == {True: [6, 7, 7], False: [6]}  # of the queries the loss and its report, of which this one is a part


def test_imaml_has_the_exact_implicit_gradient_of_a_quadratic():
    model, (sx, sy, qx, qy) = quadratic()
    strength, theta = 0.7, np.array(model.weight, np.float64)[0]
    hessian = 2 * sx[0].T @ sx[0] / 5
    best = np.linalg.solve(hessian + strength * np.eye(3), 2 * sx[0].T @ sy[0, :, 0] / 5 + strength * theta)
    query = 2 * qx[0].T @ (qx[0] @ best - qy[0, :, 0]) / 7
    expected = np.linalg.solve(np.eye(3) + hessian / strength, query)
    learner = learner_class("imaml")(
        model, inner_lr=0.2, num_inner_steps=100, strength=strength, cg_steps=3, compile=False
    )
    task = [tuple(mx.array(part[0], dtype=mx.float32) for part in (sx, sy, qx, qy))]
    adapted = learner.adapt(*task[0][:2])
    np.testing.assert_allclose(np.array(adapted.weight)[0], best, atol=1e-5)
    _, grads = learner.meta_gradient(task)
    np.testing.assert_allclose(np.array(grads["model/weight"])[0], expected, atol=1e-5)


def test_imaml_with_endless_strength_stays_at_theta():
    stack, model = sines(3), MLP(hidden_dim=8)
    learner = learner_class("imaml")(model, strength=1e20, num_inner_steps=3)
    assert_close(trainable(learner.adapt(stack.support_x[0], stack.support_y[0])), trainable(model), 1e-6)
    _, grads = learner.meta_gradient(stack)
    plain = learner_class("maml")(model, num_inner_steps=0).meta_gradient(stack)[1]
    assert_close(grads, plain)


def test_imaml_memory_does_not_grow_with_the_steps(peak_bytes):
    def peak(steps):
        learner = learner_class("imaml")(MLP(hidden_dim=64), inner_lr=1e-3, num_inner_steps=steps, compile=False)
        stack = sines(8, support=50)
        mx.eval(stack)
        return peak_bytes(lambda: mx.eval(learner.meta_gradient(stack)[1]))

    assert peak(20) <= 1.3 * peak(5)


def test_imaml_clips_over_all_arrays_at_once():
    rule = proximal_sgd(0.5, 2.0, largest=1.0)  # the pull keeps half of a step
    theta = {"a": mx.array([1.0, 2.0]), "b": mx.array([3.0])}
    grads = {"a": mx.array([6.0, 0.0]), "b": mx.array([8.0])}
    stepped, _ = rule.update({}, rule.start(theta), grads, theta, 0)
    np.testing.assert_allclose(np.array(stepped["a"]), [1 - 0.25 * 0.6, 2], rtol=1e-6)
    np.testing.assert_allclose(np.array(stepped["b"]), [3 - 0.25 * 0.8], rtol=1e-6)
    free, _ = proximal_sgd(0.5, 2.0).update({}, rule.start(theta), grads, theta, 0)
    np.testing.assert_allclose(np.array(free["b"]), [3 - 0.25 * 8])


def test_conjugate_gradient_survives_an_exact_solution_and_negative_curvature():
    factors = mx.array([[2.0], [-1.0], [2.0]])  # three systems at once
    solved = conjugate_gradient(lambda v: factors * v, mx.array([[1.0, -3.0], [1.0, 2.0], [0.0, 0.0]]), 5)
    np.testing.assert_allclose(np.array(solved), [[0.5, -1.5], [0, 0], [0, 0]], atol=1e-6)
    saddle, b = mx.array([[2.0, -0.5]]), mx.array([[1.0, 1.0]])  # the second direction curves down, a later one up
    one, many = (conjugate_gradient(lambda v: saddle * v, b, steps) for steps in (1, 20))
    np.testing.assert_allclose(np.array(one), np.array(many), rtol=1e-6)
    large = conjugate_gradient(lambda v: 2 * v, mx.array([[1e25, -3e25], [1e-25, 0.0]]), 5)
    np.testing.assert_allclose(np.array(large), [[0.5e25, -1.5e25], [0.5e-25, 0]], rtol=1e-6)
    flat = conjugate_gradient(lambda v: mx.array([[1e-6], [0.2]]) * v, mx.array([[1.0], [1.0]]), 5)
    np.testing.assert_allclose(np.array(flat), [[0], [5]], rtol=1e-6)  # hardly any curvature: no step of a million


# --- CAVIA -----------------------------------------------------------------------------------------------------------


def test_cavia_is_a_context_concatenated_to_the_input():
    model, task = MLP(hidden_dim=8), singles(sines(1))[0]
    learner = learner_class("cavia")(model, inner_lr=0.1, num_inner_steps=2, num_context=3)
    weights = learner.meta["rule"]["modulation.layers.0.bias"]
    wide = MLP(4, hidden_dim=8)
    own = {**trainable(model), "layers.0.weight": mx.concatenate([model.layers[0].weight, weights], axis=1)}

    def predict(context, x):
        rows = mx.broadcast_to(context, (x.shape[0], 3))
        return functional(wide)(own, mx.concatenate([x, rows], axis=1))

    context = mx.zeros(3)
    for _ in range(2):
        context = context - 0.1 * mx.grad(lambda c: mse_loss(predict(c, task.support_x), task.support_y))(context)
    adapted = learner.adapt(task.support_x, task.support_y)
    np.testing.assert_allclose(
        np.array(adapted(task.query_x)), np.array(predict(context, task.query_x)), rtol=1e-5, atol=1e-6
    )
    before, after = trainable(model), trainable(adapted)
    assert {name for name in before if not mx.array_equal(before[name], after[name])} == {"layers.0.bias"}


def test_cavia_is_film_where_the_first_bias_is_a_norm():
    model = Conv4((8, 8, 1), 3, hidden_dim=4, num_layers=2)
    assert set(modulated_paths(model)) == {"blocks.0.norm.weight", "blocks.0.norm.bias"}
    with pytest.raises(ConfigurationError, match="layers"):
        learner_class("cavia")(MLP(), modulates=["layers.0.bas"])


@pytest.mark.parametrize(("name", "options"), [("cavia", {}), ("leo", {"decodes": "all", "finetune_steps": 3})])
def test_checkpointed_steps_give_the_same_gradient(name, options, monkeypatch):
    def gradient():
        learner = learner_class(name)(MLP(hidden_dim=8), inner_lr=0.001, num_inner_steps=3, **options)
        return learner.meta_gradient(sines(1))[1]  # one task: under `vmap` nothing is checkpointed

    plain = gradient()
    monkeypatch.setattr(loop, "KEPT", 0)
    assert_close(gradient(), plain)


# --- LEO -------------------------------------------------------------------------------------------------------------


def test_kl_and_decorrelation_are_their_closed_forms():
    mean, std = mx.array([[0.5, -1.0], [0.0, 2.0]]), mx.array([[1.0, 0.5], [2.0, 1.5]])
    x = np.linspace(-30, 30, 200_001)
    total = 0.0
    for m, s in zip(np.array(mean).ravel(), np.array(std).ravel(), strict=True):
        log_p = -0.5 * ((x - m) / s) ** 2 - np.log(s)
        log_q = -0.5 * x**2
        total += np.trapezoid(np.exp(log_p) / np.sqrt(2 * np.pi) * (log_p - log_q), x)
    assert kl_to_standard_normal(mean, std).item() == pytest.approx(total / 2, rel=1e-5)
    assert kl_to_standard_normal(mx.zeros((3, 2)), mx.ones((3, 2))).item() == 0
    assert decorrelation(mx.array([[3.0, 0.0], [0.0, 0.2]])).item() == pytest.approx(0, abs=1e-6)
    assert decorrelation(mx.array([[1.0, 0.0], [2.0, 0.0]])).item() == pytest.approx(0.5)


def test_leo_decodes_a_row_for_each_class_or_all_weights_at_once():
    head = Target({"head.weight": (3, 4), "head.bias": (3,)}, per_class=True)
    assert (head.codes, head.size) == (3, 5)
    rows = mx.arange(15).reshape(3, 5)
    decoded = head.weights(rows)
    assert mx.array_equal(decoded["head.weight"], rows[:, :4])
    assert mx.array_equal(decoded["head.bias"], rows[:, 4])
    everything = Target({"a": (2, 3), "b": (4,)}, per_class=False)
    assert (everything.codes, everything.size) == (1, 10)
    shapes = {path: tuple(a.shape) for path, a in everything.weights(mx.zeros((1, 10))).items()}
    assert shapes == {"a": (2, 3), "b": (4,)}


def test_leo_encodes_the_mean_over_pairs():
    """The relation network is the whole MLP on every pair; how `encode` cuts it up must not show."""
    net = MLP(4, 4, 5, key=mx.random.key(3))
    net.layers[0].bias = mx.array([0.3, -0.2, 0.1, 0.0, 0.4])
    net.head.bias = mx.array([0.1, -0.1, 0.2, -12.0])  # the last deviation is at its bound
    arrays = {"encoder.weight": mx.array([[1.0, 0.5], [0.0, 2.0]])}
    arrays |= {f"relation.{path}": value for path, value in trainable(net).items()}
    x = mx.array([[1.0, 1.0], [3.0, 0.0], [5.0, 2.0]])
    groups = mx.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mean, std = encode(arrays, x, groups)
    codes = np.array(x) @ np.array(arrays["encoder.weight"]).T
    related = np.array([[net(mx.array(np.concatenate([a, b])[None]))[0] for b in codes] for a in codes]).mean(1)
    moments = np.stack([related[:2].mean(0), related[2]])
    np.testing.assert_allclose(np.array(mean), moments[:, :2], rtol=1e-5)
    np.testing.assert_allclose(np.array(std), np.exp(np.clip(moments[:, 2:], -10, 3)), rtol=1e-4)


def test_leo_adapts_without_chance_and_fine_tunes_every_code():
    task = singles(sines(1))[0]
    options = {"decodes": "all", "inner_lr": 0.001, "num_inner_steps": 3}
    learner = learner_class("leo")(MLP(hidden_dim=8), **options, finetune_steps=2, seed=1)
    once, again = (trainable(learner.adapt(task.support_x, task.support_y)) for _ in range(2))
    assert all(mx.array_equal(once[name], again[name]) for name in once)
    curve = learner.evaluate([task], num_adaptation_steps=(0, 1, 3))
    for k in (0, 1, 3):
        adapted = learner.adapt(task.support_x, task.support_y, num_steps=k)
        assert curve[f"step_{k}_loss"] == pytest.approx(mse_loss(adapted(task.query_x), task.query_y).item(), rel=1e-4)
    assert len({curve[f"step_{k}_loss"] for k in (0, 1, 3)}) == 3


def test_leo_says_what_it_needs():
    with pytest.raises(TaskSamplingError, match="decodes='all'"):
        learner_class("leo")(MLP()).meta_train_step(sines(1))


# --- learning --------------------------------------------------------------------------------------------------------

REGRESSION = {
    "r2d2": {},
    "alpaca": {},
    "cavia": {"inner_lr": 0.3},
    "imaml": {"num_inner_steps": 16},
    "leo": {"decodes": "all", "inner_lr": 0.001, "gradient_clip": 10.0},
}


@pytest.mark.parametrize("name", REGRESSION)
def test_fifty_steps_lower_the_held_out_error(name):
    learner = learner_class(name)(MLP(hidden_dim=16), outer_lr=0.01, **{"num_inner_steps": 2} | REGRESSION[name])
    steps = learner.num_inner_steps
    held_out = sines(30, seed=99)
    before = learner.evaluate(held_out, num_adaptation_steps=(steps,))["final_loss"]
    for i in range(50):
        learner.meta_train_step(sines(8, seed=i))
    assert learner.evaluate(held_out, num_adaptation_steps=(steps,))["final_loss"] < 0.8 * before


@pytest.mark.parametrize("name", ["r2d2", "leo", "cavia"])
def test_fifty_steps_lower_the_held_out_loss(name):
    # Clipped: at this rate one jump of LEO's decoder can undo what was learned, and rounding decides whether it comes.
    model, rates = SimpleClassifier(hidden_dim=16, num_classes=3), {"inner_lr": 0.1, "outer_lr": 0.01}
    learner = learner_class(name)(model, gradient_clip=1.0, **rates)
    held_out = blobs(20, seed=99)
    before = learner.evaluate(held_out, num_adaptation_steps=(5,))["final_loss"]
    for i in range(50):
        learner.meta_train_step(blobs(4, seed=i))
    assert learner.evaluate(held_out, num_adaptation_steps=(5,))["final_loss"] < 0.8 * before

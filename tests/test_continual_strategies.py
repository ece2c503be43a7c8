"""Continual-learning strategies against closed forms, and the identities that tie them to plain fine-tuning."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit.adapters import adapter_config, attach
from efficientai_toolkit.backbones.mlp import MLP
from efficientai_toolkit.continual import STRATEGIES, build_learner, strategy_class
from efficientai_toolkit.continual.agem import project
from efficientai_toolkit.continual.ewc import ElasticWeights
from efficientai_toolkit.continual.fisher import fisher_diagonal
from efficientai_toolkit.continual.learner import ContinualLearner
from efficientai_toolkit.continual.lwf import LearningWithoutForgetting
from efficientai_toolkit.continual.objects import EWC, ExperienceReplay
from efficientai_toolkit.continual.progressive import ProgressiveNetwork
from efficientai_toolkit.continual.separate import SeparateLearner
from efficientai_toolkit.continual.si import SynapticIntelligence
from efficientai_toolkit.continual.strategy import Strategy
from efficientai_toolkit.errors import ConfigurationError, DataError, DivergenceError
from efficientai_toolkit.nn.functional import functional, trainable

PENALTIES = [name for name in STRATEGIES if name not in ("joint", "class-means", "progressive", "separate")]


def two_contexts(seed: int = 0, n: int = 96, classes: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same classes around centres that move from one context to the next."""
    rng = np.random.default_rng(seed)
    contexts = []
    for _ in range(2):
        y = rng.integers(0, classes, n).astype(np.int32)
        x = 2 * rng.normal(size=(classes, 6))[y] + rng.normal(size=(n, 6))
        contexts.append((x.astype(np.float32), y))
    return contexts


def model(seed: int = 0, outputs: int = 3) -> MLP:
    return MLP(6, outputs, 8, 1, key=mx.random.key(seed))


def learn_both(strategy: Strategy | None, net: nn.Module | None = None, **settings) -> ContinualLearner:
    learner = ContinualLearner(net or model(), strategy, **{"iterations": 12, "batch_size": 32, **settings})
    for x, y in two_contexts():
        learner.learn_task(x, y)
    return learner


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


class Logistic(nn.Module):
    """Softmax regression."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.head = nn.Linear(inputs, outputs)

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize("factored", [True, False])
def test_fisher_of_logistic_regression_is_exact(factored):
    """F of weight (i, d) is mean p_i (1 − p_i) x_d², of bias i it is mean p_i (1 − p_i)."""
    net, x = Logistic(5, 3), np.random.default_rng(0).normal(size=(41, 5)).astype(np.float32)
    logits = x.astype(float) @ np.array(net.head.weight, float).T + np.array(net.head.bias, float)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = fisher_diagonal(net, trainable(net), x, factored=factored)
    np.testing.assert_allclose(found["head.weight"], (p * (1 - p)).T @ x**2 / 41, rtol=1e-5)
    np.testing.assert_allclose(found["head.bias"], (p * (1 - p)).mean(0), rtol=1e-5)


@pytest.mark.parametrize("factored", [True, False])
def test_empirical_fisher_squares_the_gradient_of_every_example(factored):
    net, (x, y) = model(), two_contexts()[0]
    x, y = x[:20], y[:20]
    apply, params = functional(net), trainable(net)
    expected = {path: np.zeros(p.shape) for path, p in params.items()}
    for row, label in zip(x, y, strict=True):
        grads = mx.grad(lambda p, row=row, label=int(label): nn.losses.cross_entropy(
            apply(p, mx.array(row[None])), mx.array([label])).sum())(params)  # fmt: skip
        for path, g in grads.items():
            expected[path] += np.square(np.array(g, float)) / len(y)
    found = fisher_diagonal(net, params, x, y, labels="true", factored=factored)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("labels", ["all", "predicted", "sample"])
def test_factored_fisher_is_the_fisher(labels):
    net, x = model(), two_contexts()[0][0][:37]
    mask = np.array([True, True, False])
    fast, slow = (
        fisher_diagonal(net, trainable(net), x, active=mask, labels=labels, factored=f, rng=np.random.default_rng(1))
        for f in (True, False)
    )
    for path in slow:
        np.testing.assert_allclose(fast[path], slow[path], rtol=1e-4, atol=1e-7)
    assert not np.array(fast["head.bias"])[2]  # a class that is out of question has no information


def test_sampled_labels_are_drawn_from_the_model():
    net, x = Logistic(5, 3), np.random.default_rng(0).normal(size=(4000, 5)).astype(np.float32)
    exact = fisher_diagonal(net, trainable(net), x)
    sampled = fisher_diagonal(net, trainable(net), x, labels="sample")
    np.testing.assert_allclose(sampled["head.bias"], exact["head.bias"], rtol=0.1)


def test_a_model_that_mixes_rows_is_not_factored():
    class Mixing(Logistic):
        def __call__(self, x):
            return self.head(x - x.mean(axis=0))

    net, x = Mixing(5, 3), np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    found, slow = (fisher_diagonal(net, trainable(net), x, factored=f) for f in (None, False))
    assert same(found, slow)


def test_separate_parabolas_are_summed_as_one():
    """λ/2 Σ_k F_k (θ − θ_k)² has the gradient of the one parabola that is kept, at any θ."""
    rng = np.random.default_rng(0)
    draw = lambda: {"w": mx.array(rng.random(5).astype(np.float32))}  # noqa: E731
    centres, fishers, at = [draw() for _ in range(3)], [draw() for _ in range(3)], draw()
    fishers[1] = {"w": mx.zeros(5)}
    ewc = ElasticWeights(3.0)
    state = ewc.start(centres[0])
    for centre, fisher in zip(centres, fishers, strict=True):
        state = ewc.consolidate(state, centre, fisher)
    found = mx.grad(lambda p: ewc.penalty(state, p, None, {}))(at)["w"]
    expected = 3.0 * sum(f["w"] * (at["w"] - c["w"]) for f, c in zip(fishers, centres, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_online_ewc_decays_and_recentres():
    one, two = {"w": mx.array([1.0])}, {"w": mx.array([5.0])}
    ewc = ElasticWeights(1.0, online=True, gamma=0.5)
    state = ewc.consolidate(ewc.consolidate(ewc.start(one), one, {"w": mx.array([4.0])}), two, {"w": mx.array([3.0])})
    assert state["precision"]["w"].item() == 0.5 * 4 + 3
    assert state["centre"]["w"].item() == 5.0


def test_si_importance_by_hand():
    """Two steps of one weight: ω = −Σ g δθ, Ω = ω / (Δ² + ξ); the penalty's own gradient does not count."""
    si = SynapticIntelligence(2.0, xi=0.5)
    state = {"importance": {"w": mx.array([3.0])}, "path": {"w": mx.array([0.0])}, "centre": {"w": mx.array([1.0])}}
    steps = [(1.0, 1.4, -2.0), (1.4, 1.5, -1.0)]
    for old, new, task_gradient in steps:
        whole = task_gradient + 2 * 2.0 * 3.0 * (old - 1.0)
        state = si.track(state, *({"w": mx.array([v])} for v in (whole, old, new)))
    assert state["path"]["w"].item() == pytest.approx(2.0 * 0.4 + 1.0 * 0.1, rel=1e-5)
    learner = ContinualLearner(model(), si)
    lesson = learner._lesson(*two_contexts()[0], None, None)._replace(params={"w": mx.array([1.5])})
    end = si.end(state, lesson)
    assert end["importance"]["w"].item() == pytest.approx(3.0 + 0.9 / (0.25 + 0.5), rel=1e-5)
    assert end["centre"]["w"].item() == 1.5


def test_lwf_loss_by_hand():
    lwf = LearningWithoutForgetting(temperature=2.0)
    logits, teacher = np.array([[1.0, 3.0, 9.0], [0.0, -1.0, 9.0]]), np.array([[2.0, 0.0, 7.0], [4.0, 4.0, 7.0]])

    def soft(z):
        e = np.exp(z / 2.0)
        return e / e.sum(-1, keepdims=True)

    # Over the first two outputs, as for an earlier task of two classes.
    by_hand = -(soft(teacher[:, :2]) * np.log(soft(logits[:, :2]))).sum(-1)
    mask = mx.array([[True, True, False]])
    arrays = [mx.array(a.astype(np.float32)) for a in (logits, teacher)]
    found = lwf.distillation(*arrays, mx.ones((2,)), mask, mask, mx.array([3.0]))
    assert found.item() == pytest.approx(3 * by_hand.mean(), rel=1e-5)
    first = lwf.distillation(*arrays, mx.array([1.0, 0.0]), mask, mask, mx.array([1.0]))  # a row without a teacher
    assert first.item() == pytest.approx(by_hand[0], rel=1e-5)


def test_agem_projects_onto_what_does_not_oppose():
    grads, reference = (
        {"a": mx.array([1.0, 0.0]), "b": mx.array([2.0])},
        {"a": mx.array([0.0, 3.0]), "b": mx.array([-1.0])},
    )
    found = project(grads, reference)
    # g·r = −2, r·r = 10: g + 0.2 r
    np.testing.assert_allclose(found["a"], [1.0, 0.6], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [1.8], rtol=1e-6)
    assert abs(sum(mx.sum(found[p] * reference[p]).item() for p in found)) < 1e-6
    agreeing = {"a": mx.array([0.0, 1.0]), "b": mx.array([-1.0])}
    assert same(project(agreeing, reference), agreeing)
    assert same(project(grads, {p: mx.zeros_like(g) for p, g in grads.items()}), grads)


@pytest.mark.parametrize(
    "strategy", [ElasticWeights(0.0), SynapticIntelligence(0.0), LearningWithoutForgetting(weight=0.0)]
)
def test_strength_zero_is_plain_fine_tuning_bit_for_bit(strategy):
    assert same(learn_both(strategy).params, learn_both(None).params)


@pytest.mark.parametrize(
    ("strategy", "weak"),
    [(ElasticWeights(3e3), ElasticWeights(1e-3)), (SynapticIntelligence(1e3), SynapticIntelligence(1e-3))],
)
def test_a_strong_penalty_holds_the_first_context(strategy, weak):
    (x, y), _ = two_contexts()
    held, lost = (learn_both(s, iterations=150, learning_rate=0.01) for s in (strategy, weak))
    assert held.accuracy(x, y) > 0.9 > lost.accuracy(x, y) + 0.1


@pytest.mark.parametrize("name", PENALTIES)
def test_same_seed_same_bits_and_compiled_is_eager(name):
    runs = []
    for compiled in (True, True, False):
        learner = build_learner(name, model(), iterations=6, batch_size=16, seed=3, compile=compiled)
        for x, y in two_contexts():
            learner.learn_task(x, y)
        runs.append(learner.params)
    assert same(runs[0], runs[1])
    for path, value in runs[0].items():
        np.testing.assert_allclose(value, runs[2][path], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_adapters_learn_and_the_base_stays(name):
    net = attach(model(), adapter_config("lora", rank=2), "linear")
    frozen = {p: mx.array(a) for p, a in nn.utils.tree_flatten(net.parameters()) if p not in trainable(net)}
    before = trainable(net)
    learner = build_learner(name, net, iterations=4, batch_size=16)
    for x, y in two_contexts():
        learner.learn_task(x, y)
    assert not same(learner.params, before)
    after = dict(nn.utils.tree_flatten(net.parameters()))
    assert same({p: after[p] for p in frozen}, frozen)


@pytest.mark.parametrize("name", [*PENALTIES, "separate", "ewc+replay"])
def test_a_learner_that_was_put_away_goes_on_with_the_same_bits(name, tmp_path):
    from efficientai_toolkit.checkpoint import read_npz, write_npz

    first, second = two_contexts()
    whole = build_learner(name, model(), iterations=5, batch_size=16, kind="task")
    whole.learn(*first)
    write_npz(tmp_path / "half.npz", whole.state(), {})
    whole.learn(*second)
    resumed = build_learner(name, model(), iterations=5, batch_size=16, kind="task")
    resumed.load_state(read_npz(tmp_path / "half.npz")[0])
    resumed.learn(*second)
    assert same(*({n: mx.array(a) for n, a in learner.state().items()} for learner in (whole, resumed)))


def test_progressive_networks_leave_earlier_columns_alone_and_grow_laterals():
    contexts = two_contexts()
    network = ProgressiveNetwork(model(), hidden_size=4, iterations=8, batch_size=16)
    base = {p: mx.array(a) for p, a in nn.utils.tree_flatten(network.network.base.parameters())}
    network.add_new_task(*contexts[0])
    column = {p: mx.array(a) for p, a in nn.utils.tree_flatten(network.network.columns[0].parameters())}
    logits = mx.array(network.predict(contexts[0][0], 0))
    network.add_new_task(*contexts[1], num_classes=5)
    assert same(dict(nn.utils.tree_flatten(network.network.columns[0].parameters())), column)
    assert same(dict(nn.utils.tree_flatten(network.network.base.parameters())), base)
    assert mx.array_equal(network.predict(contexts[0][0], 0), logits).item()
    assert network.predict(contexts[1][0], 1).shape == (96, 5)
    assert network.network.columns[1].laterals[0].weight.shape == (4, 4 + 8)  # the first column, the base's features
    # Two layers and a head from six inputs, and laterals from the base; then the same with one column more.
    assert network.num_parameters == (28 + 20 + 15 + 8 * 4 + 8 * 3) + (28 + 20 + 25 + 12 * 4 + 12 * 5)


def test_a_lateral_connection_carries_what_a_former_column_knows():
    contexts = two_contexts()
    network = ProgressiveNetwork(hidden_size=4, iterations=2, batch_size=16)
    for x, y in contexts:
        network.add_new_task(x, y)
    before = network.predict(contexts[0][0], 1)
    former = network.network.columns[0].layers[0]
    former.weight = former.weight + 1
    assert not mx.allclose(network.predict(contexts[0][0], 1), before).item()


def test_separate_weights_are_never_forgotten_and_routed_by_nearest_mean():
    contexts = two_contexts()
    shifted = [(x + 20 * number, y) for number, (x, y) in enumerate(contexts)]
    learner = SeparateLearner(model(), iterations=30, batch_size=16, learning_rate=0.01)
    learner.learn_task(*shifted[0])
    before = learner.evaluate(*shifted[0], context=0)
    learner.learn_task(*shifted[1])
    assert learner.evaluate(*shifted[0], context=0) == before
    assert (learner.route(shifted[0][0]) == 0).mean() > 0.95
    assert (learner.route(shifted[1][0]) == 1).mean() > 0.95
    known = [learner.evaluate(*context, context=k) for k, context in enumerate(shifted)]
    routed = [learner.evaluate(*context) for context in shifted]
    np.testing.assert_allclose(routed, known, atol=0.05)


def test_plain_objects():
    (x0, y0), (x1, y1) = two_contexts()
    trained = model()
    ContinualLearner(trained, iterations=100, learning_rate=0.01).learn_task(x0, y0)
    start = trainable(trained)
    kept = []
    for strength in (0.0, 1e5):
        net = model()
        net.update(nn.utils.tree_unflatten(list(start.items())))
        ewc = EWC(net, ewc_lambda=strength, fisher_scale=1.0, iterations=150, learning_rate=0.01)
        ewc.learn_task(x1, y1, previous_tasks=[(x0, y0)])
        kept.append(ewc.accuracy(x0, y0))
    assert kept[1] > kept[0] + 0.1
    replay = ExperienceReplay(model(), memory_size=30, iterations=3, batch_size=8)
    replay.learn_task(x0, y0)
    replay.learn_task(x1, y1)
    memory = replay.strategies["replay"].memory
    assert len(memory) == 30
    assert replay.memory_bytes == memory.nbytes == 30 * (6 * 4 + 4 + 4)


def test_replay_weights_are_a_share_of_contexts():
    """After k contexts the current one has 1/k of the loss, and rows of one batch have weights that sum to 1."""
    replay = strategy_class("replay")(20)
    learner = ContinualLearner(model(), replay, iterations=1, batch_size=8)
    for x, y in two_contexts():
        learner.learn_task(x, y)
    replay._former = 2
    x, y = two_contexts()[0]
    rows = {"x": x[:8], "y": y[:8], "context": np.full(8, 2, np.int32), "weight": np.full(8, 1 / 8, np.float32)}
    batch = replay.extend(rows, np.random.default_rng(0))
    assert batch["weight"][:8].sum() == pytest.approx(1 / 3, rel=1e-5)
    assert batch["weight"].sum() == pytest.approx(1, rel=1e-5)
    assert set(batch["context"][8:].tolist()) == {0, 1}


def test_mistakes_are_sentences():
    with pytest.raises(ConfigurationError, match="did you mean 'replay'"):
        build_learner("reply", model())
    with pytest.raises(ConfigurationError, match="no option 'lambda'"):
        build_learner("ewc", model(), {"lambda": 3})
    with pytest.raises(ConfigurationError, match="ewc_lambda must be at least 0"):
        ElasticWeights(-1.0)
    with pytest.raises(ConfigurationError, match="given twice"):
        ContinualLearner(model(), [ElasticWeights(), ElasticWeights()])
    learner = ContinualLearner(model(), iterations=2)
    with pytest.raises(DataError, match="one class each"):
        learner.learn_task(np.zeros((3, 6)), np.zeros(4, int))
    with pytest.raises(DataError, match="integers"):
        learner.learn_task(np.zeros((3, 6)), np.zeros(3))
    with pytest.raises(DivergenceError, match="context 0"):
        learner.learn_task(np.full((3, 6), np.nan), np.zeros(3, int))

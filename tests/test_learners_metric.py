"""Metric learners and Baseline++ by hand, with labels of any kind."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import (
    MLP,
    ConfigurationError,
    ModelError,
    SimpleClassifier,
    TaskSamplingError,
    cross_entropy_loss,
    functional,
    learner_class,
    trainable,
)
from efficientai_toolkit.learners.protonet import PrototypicalNetwork
from efficientai_toolkit.learners.relation import score_error
from learner_cases import assert_close, blobs, singles


def encoder(size: int = 4) -> nn.Module:
    """A model without a head: its output is the embedding."""
    one, two = mx.random.split(mx.random.key(3))
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, size))
    model.layers[0].weight, model.layers[0].bias = mx.random.normal((8, 2), key=one), mx.zeros(8)
    model.layers[2].weight, model.layers[2].bias = 0.5 * mx.random.normal((size, 8), key=two), mx.zeros(size)
    return model


def embeddings(model, task):
    z = [np.array(model(x), np.float64) for x in (task.support_x, task.query_x)]
    y = np.array(task.support_y)
    return *z, y, np.stack([z[0][y == c].mean(0) for c in range(3)])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_prototypes_and_distances_by_hand():
    model, task = encoder(), singles(blobs(1))[0]
    _, q, _, means = embeddings(model, task)
    logits = np.array(PrototypicalNetwork(model).adapt(task.support_x, task.support_y)(task.query_x))
    np.testing.assert_allclose(logits[:, :3], -((q[:, None] - means) ** 2).sum(-1), rtol=1e-4, atol=1e-4)
    expected = np.broadcast_to(logits[:, :3].min(1, keepdims=True) - 20, (12, 3))
    np.testing.assert_allclose(logits[:, 3:], expected, rtol=1e-5)  # slots for classes that the support lacks
    cosine = PrototypicalNetwork(model, distance_metric="cosine", scale=5.0)
    logits = np.array(cosine.adapt(task.support_x, task.support_y)(task.query_x))
    np.testing.assert_allclose(logits[:, :3], 5 * unit(q) @ unit(means).T, atol=1e-4)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_proto_maml_without_steps_is_a_prototypical_network(distance):
    """Up to each query's own length, where the cosine is concerned; exactly, with its gradient, for distances."""
    task, model = blobs(3), MLP(2, 3, 8, key=mx.random.key(1))
    proto_maml = learner_class("proto_maml")(model, num_inner_steps=0, distance_metric=distance, scale=5.0)
    network = learner_class("protonet")(model, distance_metric=distance, scale=5.0, head="head")
    own, theirs = (learner.adapt(task.support_x[0], task.support_y[0]) for learner in (proto_maml, network))
    x = task.query_x[0]
    if distance == "euclidean":
        a, b = mx.softmax(own(x), axis=-1), mx.softmax(theirs(x)[:, :3], axis=-1)
        np.testing.assert_allclose(a, b, atol=1e-5)
        gradients = [
            {p: g for p, g in learner.meta_gradient(task)[1].items() if "head" not in p and p.startswith("model/")}
            for learner in (proto_maml, network)
        ]
        assert_close(*gradients)
    else:
        z = np.array(proto_maml.problem().features(proto_maml.meta["model"], x))
        size = np.linalg.norm(proto_maml.problem().features(proto_maml.meta["model"], task.support_x[0]), axis=1).mean()
        cosines = np.array(theirs(x)[:, :3]) * (np.linalg.norm(z, axis=1, keepdims=True) / size)
        np.testing.assert_allclose(own(x), cosines, atol=1e-4)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_proto_maml_takes_nothing_of_the_models_own_head(distance):
    """Classes may be numbered anew, the head's weights be others: the adapted model says the same, and no gradient."""
    task = blobs(2)
    options = {"inner_lr": 0.02, "num_inner_steps": 2, "distance_metric": distance}
    one = learner_class("proto_maml")(MLP(2, 4, 8, key=mx.random.key(1)), **options)
    adapted = one.adapt(task.support_x[0], task.support_y[0])(task.query_x[0])
    assert mx.all(adapted[:, 3] < mx.max(adapted, axis=1)).item()  # a class without examples
    swapped = one.adapt(task.support_x[0], 2 - task.support_y[0])(task.query_x[0])
    np.testing.assert_allclose(swapped[:, 2::-1], adapted[:, :3], atol=1e-4)
    grads = one.meta_gradient(task)[1]
    assert not any(mx.any(g).item() for path, g in grads.items() if "head" in path)
    assert any(mx.any(g).item() for path, g in grads.items() if "head" not in path)
    model = MLP(2, 4, 8, key=mx.random.key(1))
    model.head.weight = model.head.weight + 1
    other = learner_class("proto_maml")(model, **options)
    assert_close(other.meta_gradient(task)[1], grads)


def test_proto_mamls_meta_gradient_is_the_difference_quotient():
    """Second order agrees with central differences, first order does not; both pass through the head's start."""
    task = blobs(2, shot=3)
    options = {"inner_lr": 0.05, "num_inner_steps": 2, "compile": False}
    exact, first = (
        learner_class("proto_maml")(MLP(2, 3, 6, key=mx.random.key(2)), first_order=flag, **options)
        for flag in (False, True)
    )
    _, grads = exact.meta_gradient(task)
    start = {path: mx.array(p) for path, p in exact.meta["model"].items()}
    direction = {path: mx.random.normal(p.shape, key=mx.random.key(5)) for path, p in start.items()}

    def loss(step):
        exact.meta["model"].update({path: p + step * direction[path] for path, p in start.items()})
        value = exact.meta_gradient(task)[0]["query_loss"]
        exact.meta["model"].update(start)
        return mx.mean(value).item()

    quotient = (loss(2e-3) - loss(-2e-3)) / 4e-3
    slope = [
        sum(mx.sum(g[f"model/{path}"] * d).item() for path, d in direction.items())
        for g in (grads, first.meta_gradient(task)[1])
    ]
    assert abs(slope[0] - quotient) < 0.005 * abs(quotient)
    assert abs(slope[1] - quotient) > 0.03 * abs(quotient)


def test_proto_maml_refuses_numbers_and_heads_that_are_none():
    with pytest.raises(TaskSamplingError, match="Proto-MAML is for classification"):
        learner_class("proto_maml")(MLP(2, 3)).adapt(mx.zeros((4, 2)), mx.zeros((4, 3)))
    with pytest.raises(ConfigurationError, match="did you mean 'cosine'"):
        learner_class("proto_maml")(MLP(2, 3), distance_metric="cosin")
    model = MLP(2, 3)
    model.head.freeze()
    with pytest.raises(ModelError, match=r"must be a trainable nn\.Linear"):
        learner_class("proto_maml")(model)


def test_matching_is_attention_over_the_support():
    model, task = encoder(), singles(blobs(1))[0]
    z, q, y, _ = embeddings(model, task)
    scores = np.exp(10 * unit(q) @ unit(z).T)
    expected = (scores / scores.sum(1, keepdims=True)) @ np.eye(3)[y]
    found = mx.exp(learner_class("matching")(model).adapt(task.support_x, task.support_y)(task.query_x))
    np.testing.assert_allclose(np.array(found)[:, :3], expected, atol=1e-5)
    np.testing.assert_allclose(np.array(found).sum(1), 1, atol=1e-5)


def test_full_context_embeddings_see_the_whole_support():
    task = singles(blobs(1))[0]
    learner = learner_class("matching")(encoder(), full_context=True, reads=2)
    assert learner.meta["rule"]["attention.hidden"].shape == (16, 8)
    problem = learner.problem()

    def support(x):
        return learner.learner.adapt(problem, learner.meta, x, task.support_y, key=None, num_steps=0)["support"]

    # Changing the last example changes the embedding of the first, through the backward LSTM; and the other way round.
    changed = mx.concatenate([task.support_x[:-1], task.support_x[-1:] + 1])
    assert not mx.allclose(support(task.support_x)[0], support(changed)[0])
    changed = mx.concatenate([task.support_x[:1] + 1, task.support_x[1:]])
    assert not mx.allclose(support(task.support_x)[-1], support(changed)[-1])


def test_relation_scores_by_hand():
    model, task = encoder(), singles(blobs(1))[0]
    learner = learner_class("relation")(model, hidden_dim=8)
    _, q, _, means = embeddings(model, task)
    relate, arrays = functional(MLP(8, 1, 8, 2)), learner.meta["rule"]
    logits = np.array(learner.adapt(task.support_x, task.support_y)(task.query_x))
    for c in range(3):
        pairs = mx.array(np.concatenate([np.broadcast_to(means[c], q.shape), q], axis=1), dtype=mx.float32)
        np.testing.assert_allclose(logits[:, c], np.array(relate(arrays, pairs))[:, 0], atol=1e-4)
    scores = 1 / (1 + np.exp(-logits[:, :3].astype(np.float64)))
    expected = ((scores - np.eye(3)[np.array(task.query_y)]) ** 2).sum(1).mean()
    assert score_error(mx.array(logits), task.query_y).item() == pytest.approx(expected, rel=1e-5)
    metrics, _ = learner.meta_gradient([task])
    assert metrics["query_loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("names", [["owl", "cat", "dog"], [70, -3, 12]])
def test_labels_may_be_any_integers_or_strings(names):
    task = singles(blobs(1))[0]
    truth = [names[c] for c in task.query_y.tolist()]
    given = [names[c] for c in task.support_y.tolist()]
    network = PrototypicalNetwork(encoder())
    plain = network.adapt(task.support_x, task.support_y)(task.query_x)
    found = network.classify(np.array(task.query_x), np.array(task.support_x), given)
    assert found.tolist() == [names[c] for c in mx.argmax(plain, axis=-1).tolist()]
    before = trainable(network.model)
    episode = (np.array(task.support_x), given, np.array(task.query_x), truth)
    history = network.train_episodes([episode] * 3)
    assert len(history["query_loss"]) == 3
    assert history["query_loss"][-1] < history["query_loss"][0]
    assert any(not mx.array_equal(before[name], value) for name, value in trainable(network.model).items())
    with pytest.raises(TaskSamplingError, match="not among those of the support"):
        network.train_episodes([(*episode[:3], ["bat", *truth[1:]])])


def test_more_classes_in_training_than_in_test():
    network = PrototypicalNetwork(encoder(), outer_lr=0.01)
    before = network.evaluate(blobs(20, way=3, seed=99), num_adaptation_steps=(0,))["step_0_acc"]
    for i in range(40):
        network.meta_train_step(blobs(4, way=6, seed=i))
    after = network.evaluate(blobs(20, way=3, seed=99), num_adaptation_steps=(0,))["step_0_acc"]
    assert after > before
    assert after > 0.8


def test_a_model_with_features_is_embedded_by_them():
    model, task = SimpleClassifier(hidden_dim=8, num_classes=3), singles(blobs(1))[0]
    z = np.array(model.features(task.support_x))
    y = np.array(task.support_y)
    network = PrototypicalNetwork(model)
    fast = network.learner.adapt(network.problem(), network.meta, task.support_x, task.support_y, key=None, num_steps=0)
    np.testing.assert_allclose(np.array(fast["prototypes"])[:3], [z[y == c].mean(0) for c in range(3)], atol=1e-5)


def test_user_mistakes_are_told():
    with pytest.raises(ConfigurationError, match="euclidean"):
        PrototypicalNetwork(encoder(), distance_metric="euclid")
    with pytest.raises(TaskSamplingError, match="classification"):
        PrototypicalNetwork(encoder()).adapt(mx.zeros((3, 2)), mx.zeros((3, 1)))
    with pytest.raises(ModelError, match="embedding_dim"):
        learner_class("relation")(Headed())


class Headed(nn.Module):
    """A model whose head is no dense layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.LayerNorm(2)

    def __call__(self, x):
        return self.head(self.body(x))


def test_baseline_pp_trains_jointly_and_adapts_a_fresh_head_on_frozen_features():
    model, stack = SimpleClassifier(hidden_dim=8, num_classes=3), blobs(2)
    learner = learner_class("baseline++")(model, inner_lr=0.02, num_inner_steps=10)
    _, grads = learner.meta_gradient(stack)

    def joint(params):
        x = mx.concatenate([stack.support_x, stack.query_x], axis=1).reshape(-1, 2)
        y = mx.concatenate([stack.support_y, stack.query_y], axis=1).reshape(-1)
        z = functional(model, "features")(params["model"], x)
        base = params["rule"]["base"]
        norms = mx.linalg.norm(z, axis=1)[:, None] * mx.linalg.norm(base, axis=1)
        return cross_entropy_loss(10 * z @ base.T / norms, y)

    expected = mx.grad(joint)(learner.meta)
    flat = {f"{part}/{name}": g for part, own in expected.items() for name, g in own.items()}
    assert_close(
        {n: g for n, g in grads.items() if "head" not in n}, {n: g for n, g in flat.items() if "head" not in n}
    )
    task = singles(stack)[0]
    seen = task._replace(query_x=task.support_x, query_y=task.support_y)  # what the steps lower
    curve = learner.evaluate([seen], num_adaptation_steps=(0, 10, 100))
    assert curve["step_100_loss"] < curve["step_10_loss"] < curve["step_0_loss"]
    adapted = learner.adapt(task.support_x, task.support_y)
    assert all(mx.array_equal(value, trainable(adapted.model)[name]) for name, value in trainable(model).items())


@pytest.mark.parametrize("name", ["protonet", "matching", "relation", "r2d2", "baseline++"])
def test_a_head_with_a_number_of_its_own(name):
    """Such as a learned temperature, which is no array of outputs."""

    class Head(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.temperature = mx.array(2.0)

        def __call__(self, x):
            return super().__call__(x) * self.temperature

    learner = learner_class(name)(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Head()), head="layers.2", compile=False)
    assert learner.meta_train_step(blobs(2))["query_loss"] > 0
    assert learner.evaluate(blobs(2), num_adaptation_steps=(0,))["step_0_acc"] > 0


@pytest.mark.parametrize(
    ("name", "options"), [("protonet", {}), ("matching", {"full_context": True}), ("matching", {}), ("relation", {})]
)
def test_fifty_steps_lower_the_held_out_loss(name, options):
    learner = learner_class(name)(SimpleClassifier(hidden_dim=16, num_classes=3), outer_lr=0.01, **options)
    held_out = blobs(20, seed=99)
    before = learner.evaluate(held_out, num_adaptation_steps=(0,))["final_loss"]
    for i in range(50):
        learner.meta_train_step(blobs(4, seed=i))
    assert learner.evaluate(held_out, num_adaptation_steps=(0,))["final_loss"] < 0.9 * before
    assert not learner.adapts_by_steps

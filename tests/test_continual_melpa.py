"""MeLPA: what it is at its start, what its parts are tied to, and that the outer loss counts earlier tasks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import MAMLLearner, SimpleClassifier, TaskConfig, TaskDistribution
from efficientai_toolkit.errors import ConfigurationError, TaskSamplingError
from efficientai_toolkit.learners.melpa import MeLPALearner

WEIGHT = "layers.0.weight"


def learner(**options) -> MeLPALearner:
    options = {"inner_lr": 0.1, "num_inner_steps": 2, **options}
    return MeLPALearner(SimpleClassifier(2, 6, 2, 1, key=mx.random.key(1)), **options)


def tasks(count: int = 4, index: int = 0):
    config = TaskConfig("t", "linear_classification", 2, 2, support_size=10, query_size=20)
    return TaskDistribution([config], 0, endless=True).batch_at(index, count)


def support():
    (stack,) = tasks(1)
    return stack.support_x[0], stack.support_y[0]


def same(a, b, tolerance=0.0):
    return all(np.allclose(np.array(a[p]), np.array(b[p]), rtol=tolerance, atol=tolerance) for p in a)


def plain(**options):
    return learner(head_from_means=False, **options)


def test_untrained_it_is_maml():
    """Decoders start at zero, learned rates at `inner_lr`, the optimiser's network at zero."""
    model = SimpleClassifier(2, 6, 2, 1, key=mx.random.key(1))
    maml = MAMLLearner(model, inner_lr=0.1, num_inner_steps=2)
    expected = maml.learner.adapt(maml.problem(), maml.meta, *support(), key=None, num_steps=2)
    for options in (
        {"initialisation": "universal", "update": "fixed"},
        {"initialisation": "network", "update": "rates"},
        {"initialisation": "universal", "update": "optimizer"},
    ):
        assert same(plain(**options).learn_next(None, *support()), expected, 1e-5), options
    _, theirs = maml.meta_gradient(tasks())
    _, ours = plain(initialisation="universal", update="fixed").meta_gradient(tasks())
    assert same(theirs, ours, 1e-5)


def test_the_start_depends_on_the_context_once_it_is_trained():
    ours = learner(initialisation="network")
    ours._meta["rule"][f"decode.{WEIGHT}"] = mx.ones((6, 2, 8))
    (stack,) = tasks(2)
    starts = [ours.begin(stack.support_x[i], stack.support_y[i])[WEIGHT] for i in range(2)]
    assert not mx.allclose(*starts).item()


def test_the_head_begins_at_the_class_means():
    ours = learner(initialisation="universal")
    x, y = support()
    start = ours.begin(x, y)
    z = np.array(ours.model.features(x))
    means = np.stack([z[np.array(y) == c].mean(0) for c in range(2)])
    expected = 10 * means / np.linalg.norm(means, axis=1, keepdims=True) / np.linalg.norm(z, axis=1).mean()
    np.testing.assert_allclose(start["head.weight"], expected, rtol=1e-4)
    only = ours.begin(x, mx.zeros_like(y))
    assert only["head.bias"].tolist() == pytest.approx([0, -10])


def test_fixed_parts_get_no_gradient():
    _, grads = learner(initialisation="fixed").meta_gradient(tasks())
    assert not any(mx.any(g != 0).item() for name, g in grads.items() if name.startswith("model/"))
    assert mx.any(grads[f"rule/rate.{WEIGHT}"] != 0).item()
    assert not [name for name in grads if "decode" in name or "log_scale" in name]
    _, grads = learner(update="fixed").meta_gradient(tasks())
    assert not [name for name in grads if "rate" in name]


@pytest.mark.parametrize("update", ["rates", "optimizer"])
@pytest.mark.parametrize("name", [f"rule/rate.{WEIGHT}", f"model/{WEIGHT}", f"rule/decode.{WEIGHT}"])
def test_the_gradient_through_a_sequence_is_the_slope(name, update):
    ours = learner(sequence=2, update=update, compile=False)
    group, _, path = name.partition("/")
    array = ours._meta[group][path]
    direction = mx.random.normal(array.shape, key=mx.random.key(3))
    _, grads = ours.meta_gradient(tasks(2))
    slope = mx.sum(grads[name] * direction).item()
    losses = []
    for sign in (1, -1):
        ours._meta[group][path] = array + sign * 2e-3 * direction
        losses.append(ours.meta_gradient(tasks(2))[0]["query_loss"].item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 4e-3, rel=0.03, abs=2e-3)


def test_the_outer_loss_counts_the_earlier_task_with_the_later_adapters():
    ours = learner(sequence=2, compile=False)
    (stack,) = tasks(2)
    problem = ours.problem()
    first = ours.learn_next(None, stack.support_x[0], stack.support_y[0])
    second = ours.learn_next(first, stack.support_x[1], stack.support_y[1])
    heads = {path: first[path] for path in problem.head_paths}
    earlier = problem.loss({**second, **heads}, stack.query_x[0], stack.query_y[0]).item()
    later = problem.loss(second, stack.query_x[1], stack.query_y[1]).item()
    metrics, _ = ours.meta_gradient([stack])
    assert metrics["earlier_loss"].item() == pytest.approx(earlier, rel=1e-4)
    assert metrics["query_loss"].item() == pytest.approx((earlier + later) / 2, rel=1e-4)
    assert not mx.array_equal(first[WEIGHT], second[WEIGHT]).item()


def test_stacked_sequences_are_looped_ones():
    stacked, looped = (learner(sequence=2, chunk=c).meta_gradient(tasks(4)) for c in (4, 2))
    for one, other in zip(stacked, looped, strict=True):
        assert same(one, other, 1e-4)


def test_meta_training_learns():
    ours = learner(sequence=2, outer_lr=0.01)
    before = ours.evaluate(tasks(50, index=999), num_adaptation_steps=(0, 2))
    ours.meta_train([e for i in range(25) for e in _episodes(tasks(4, i))], num_iterations=25, meta_batch_size=4)
    after = ours.evaluate(tasks(50, index=999), num_adaptation_steps=(0, 2))
    assert after["step_2_loss"] < before["step_2_loss"]


def test_mistakes_are_sentences():
    with pytest.raises(ConfigurationError, match="initialisation='net'"):
        learner(initialisation="net")
    with pytest.raises(ConfigurationError, match="update='rate'"):
        learner(update="rate")
    with pytest.raises(TaskSamplingError, match="do not make sequences of 2"):
        learner(sequence=2).meta_train_step(tasks(3))


def _episodes(stacks):
    return [tuple(part[i] for part in stack) for stack in stacks for i in range(stack.num_tasks)]

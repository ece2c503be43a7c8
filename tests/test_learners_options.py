"""Options of single learners at their edges: no inner steps, prefixes that match nothing, chunks of sequences."""

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
    learner_class,
    trainable,
)
from efficientai_toolkit.learners.relation import score_error
from learner_cases import assert_close, blobs, sines, singles


def norms_only() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    model.freeze()
    model.layers[1].unfreeze()
    return model


def test_maml_pp_refuses_a_model_with_nothing_but_norms_to_adapt():
    """Their scale and shift are learned for every step, so two supports would give one model."""
    learner = learner_class("maml++")
    with pytest.raises(ModelError, match="per_step_norm: false"):
        learner(norms_only())
    one, two = singles(blobs(2))
    adapting = learner(norms_only(), inner_lr=0.1, per_step_norm=False)
    scales = [adapting.adapt(task.support_x, task.support_y).layers[1].weight for task in (one, two)]
    assert not mx.allclose(*scales)


def test_maml_pp_takes_no_steps():
    stack, model = sines(2), MLP(hidden_dim=8)
    metrics, grads = learner_class("maml++")(model, num_inner_steps=0).meta_gradient(stack)
    expected, theirs = learner_class("maml")(model, num_inner_steps=0).meta_gradient(stack)
    assert metrics["query_loss"].item() == pytest.approx(expected["query_loss"].item(), rel=1e-6)
    assert_close({name: grads[name] for name in theirs}, theirs)


def test_every_prefix_that_anil_adapts_must_match():
    model = SimpleClassifier(2, 8, 3)
    with pytest.raises(
        ConfigurationError, match=r"'layres\.1' matches no trainable parameter; did you mean 'layers\.1'"
    ):
        learner_class("anil")(model, adapts=["head", "layres.1"])
    with pytest.raises(ConfigurationError, match="nothing to adapt"):
        learner_class("anil")(model, adapts=[])
    task = singles(blobs(1))[0]
    adapted = learner_class("anil")(model, adapts=["head.bias", "layers.1"]).adapt(task.support_x, task.support_y)
    before, after = trainable(model), trainable(adapted)
    moved = {path for path, value in before.items() if not mx.array_equal(value, after[path])}
    assert moved == {"head.bias", "layers.1.weight", "layers.1.bias"}


def test_cavia_modulates_something():
    with pytest.raises(ConfigurationError, match="modulates names no array"):
        learner_class("cavia")(MLP(1, 1, 8), modulates=[])


@pytest.mark.parametrize(("chunk", "sequence", "count"), [(4, 2, 6), (3, 2, 6), (None, 2, 6), (6, 3, 12), (9, 3, 12)])
def test_melpa_never_cuts_a_sequence(chunk, sequence, count):
    """Chunks of 4 out of 6 tasks would be 3 and 3, were they evened out task by task."""
    stack = blobs(count)
    (metrics, grads), (expected, whole) = (
        learner_class("melpa")(
            SimpleClassifier(2, 6, 3, 1), inner_lr=0.1, num_inner_steps=1, chunk=size, sequence=sequence, compile=False
        ).meta_gradient(stack)
        for size in (chunk, count)
    )
    assert metrics["query_loss"].item() == pytest.approx(expected["query_loss"].item(), rel=1e-5)
    assert_close(grads, whole)


def test_stacked_sequences_compile_with_more_steps_than_are_kept():
    options = {"inner_lr": 0.1, "num_inner_steps": 6, "sequence": 2}
    (_, stacked), (_, looped) = (
        learner_class("melpa")(SimpleClassifier(2, 6, 3, 1), chunk=size, **options).meta_gradient(blobs(4))
        for size in (4, 2)
    )
    assert_close(stacked, looped)


def test_chunks_are_as_even_as_multiples_can_be():
    sizes = [[part.num_tasks for part in sines(14).chunks(6, multiple)] for multiple in (1, 2, 3)]
    assert sizes == [[5, 5, 4], [6, 6, 2], [6, 6, 2]]
    with pytest.raises(TaskSamplingError, match="9 tasks do not make sequences of 2"):
        learner_class("melpa")(SimpleClassifier(2, 6, 3, 1), chunk=4, sequence=2).meta_train_step(blobs(9))


@pytest.mark.parametrize("seed", [0, 5])
def test_a_relation_module_does_not_begin_as_its_encoder(seed):
    """Both are an MLP of the same shapes, drawn from the same seed."""
    encoder = MLP(128, 5, 64, key=mx.random.key(seed))
    own = learner_class("relation")(encoder, hidden_dim=64, seed=seed).meta["rule"]
    for layer in (0, 1):
        ours, theirs = (np.array(a).ravel() for a in (own[f"layers.{layer}.weight"], encoder.layers[layer].weight))
        assert ours.shape == theirs.shape
        assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.1


def test_melpas_two_networks_are_drawn_apart():
    model = SimpleClassifier(2, 3, 3, 1)
    own = learner_class("melpa")(model, update="optimizer").meta["rule"]
    assert own["net.0.weight"].shape == own["code.weight"].shape
    ours, theirs = (np.array(own[name]).ravel() for name in ("net.0.weight", "code.weight"))
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.9


def test_a_relation_network_trains_and_is_evaluated_by_one_loss():
    """The paper's squared error where no loss is given, else the one that is."""
    stack, learner = blobs(3), learner_class("relation")(SimpleClassifier(2, 8, 3), hidden_dim=8)
    _, plain = learner.meta_gradient(stack)
    for loss_fn, factor in ((None, 1), (lambda scores, y: 7 * score_error(scores, y), 7), (cross_entropy_loss, None)):
        metrics, grads = learner.meta_gradient(stack, loss_fn)
        evaluated = learner.evaluate(stack, loss_fn, num_adaptation_steps=(0,))["step_0_loss"]
        assert metrics["query_loss"].item() == pytest.approx(evaluated, rel=1e-5)
        if factor:
            assert_close(grads, {name: factor * g for name, g in plain.items()})
    task = singles(stack)[0]
    expected = cross_entropy_loss(learner.adapt(task.support_x, task.support_y)(task.query_x), task.query_y).item()
    assert learner.evaluate([task], cross_entropy_loss, (0,))["final_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["maml", "reptile", "imaml", "cavia", "meta_curvature", "lslr", "leo", "melpa"])
def test_rates_may_be_numbers_of_numpy(name, kind, tmp_path):
    """As in a loop over `np.logspace`."""
    found = []
    for number in (float, kind):
        options = {"inner_lr": number(0.125), "outer_lr": number(0.0625), "gradient_clip": number(0.5)}
        learner = learner_class(name)(SimpleClassifier(2, 8, 3), num_inner_steps=1, **options)
        found.append(learner.meta_train_step(blobs(2)))
        learner.save(tmp_path / "learner.npz")
    assert found[0] == found[1]

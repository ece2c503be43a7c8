"""Identities that hold for every learner, and those that define them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from efficientai_toolkit import (
    MAML,
    MLP,
    ANILLearner,
    CheckpointError,
    ConfigurationError,
    Episode,
    EpisodeStack,
    FOMAMLLearner,
    MAMLLearner,
    MetaSGDLearner,
    ModelError,
    PrototypicalNetwork,
    ReptileLearner,
    SimpleClassifier,
    TaskSamplingError,
    cross_entropy_loss,
    functional,
    learner_class,
    mse_loss,
    trainable,
)
from efficientai_toolkit.checkpoint import read_npz, write_npz
from efficientai_toolkit.learners import graphs
from efficientai_toolkit.nn.layers import Dropout
from efficientai_toolkit.tasks.episode import as_stacks


def sines(count: int, support: int = 6, query: int = 7, seed: int = 0) -> EpisodeStack:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, (count, support + query, 1)).astype(np.float32)
    y = (rng.uniform(0.5, 2, (count, 1, 1)) * np.sin(x - rng.uniform(0, 3, (count, 1, 1)))).astype(np.float32)
    return EpisodeStack(*(mx.array(a) for a in (x[:, :support], y[:, :support], x[:, support:], y[:, support:])))


def planes(count: int, support: int = 6, query: int = 10, seed: int = 0) -> EpisodeStack:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, support + query, 2)).astype(np.float32)
    y = (x @ rng.standard_normal((count, 2, 1)) > 0)[..., 0].astype(np.int32)
    return EpisodeStack(*(mx.array(a) for a in (x[:, :support], y[:, :support], x[:, support:], y[:, support:])))


def close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        scale = max(mx.linalg.norm(b[name]).item(), 1e-6)
        assert mx.linalg.norm(a[name] - b[name]).item() <= tolerance * scale, name


def singles(stack):
    return [Episode(*(part[i] for part in stack)) for i in range(stack.num_tasks)]


def test_fomaml_is_the_plain_gradient_at_the_adapted_weights():
    model, stack = MLP(hidden_dim=8), sines(3)
    learner = FOMAMLLearner(model, inner_lr=0.05, num_inner_steps=2)
    _, grads = learner.meta_gradient(stack)
    apply, expected = functional(model), None
    for sx, sy, qx, qy in singles(stack):
        params = trainable(model)
        for _ in range(2):
            inner = mx.grad(lambda p, sx=sx, sy=sy: mse_loss(apply(p, sx), sy))(params)
            params = {name: value - 0.05 * inner[name] for name, value in params.items()}
        outer = mx.grad(lambda p, qx=qx, qy=qy: mse_loss(apply(p, qx), qy))(params)
        expected = outer if expected is None else {name: expected[name] + outer[name] for name in outer}
    close(grads, {f"model/{name}": value / 3 for name, value in expected.items()})


def test_maml_without_inner_steps_is_ordinary_training():
    model, stack = MLP(hidden_dim=8), sines(3)
    _, grads = MAMLLearner(model, num_inner_steps=0).meta_gradient(stack)
    apply = functional(model)
    x, y = (part.reshape(-1, 1) for part in (stack.query_x, stack.query_y))
    expected = mx.grad(lambda p: mse_loss(apply(p, x), y))(trainable(model))
    close(grads, {f"model/{name}": value for name, value in expected.items()})


def test_second_order_is_not_first_order():
    model, stack = MLP(hidden_dim=8), sines(3)
    second = MAMLLearner(model, inner_lr=0.1).meta_gradient(stack)[1]
    first = FOMAMLLearner(model, inner_lr=0.1).meta_gradient(stack)[1]
    close(first, MAMLLearner(model, inner_lr=0.1, first_order=True).meta_gradient(stack)[1])
    assert all(mx.linalg.norm(first[n] - second[n]).item() > 0.01 * mx.linalg.norm(second[n]).item() for n in first)


class Smooth(nn.Module):
    """A network without kinks, so that finite differences see the derivative and not the corner."""

    def __init__(self):
        super().__init__()
        one, two = mx.random.split(mx.random.key(0))
        self.body, self.head = nn.Linear(1, 16), nn.Linear(16, 1)
        self.body.weight, self.body.bias = mx.random.normal((16, 1), key=one), mx.zeros(16)
        self.head.weight, self.head.bias = 0.3 * mx.random.normal((1, 16), key=two), mx.zeros(1)

    def __call__(self, x):
        return self.head(mx.tanh(self.body(x)))


def test_maml_agrees_with_finite_differences():
    stack = sines(2)

    def learner(params=None):
        learner = MAMLLearner(Smooth(), inner_lr=0.1, num_inner_steps=3)
        if params is not None:
            learner._meta = {"model": params, "rule": {}}
        return learner

    _, grads = learner().meta_gradient(stack)
    first_order = FOMAMLLearner(Smooth(), inner_lr=0.1, num_inner_steps=3).meta_gradient(stack)[1]
    params = trainable(Smooth())
    keys = mx.random.split(mx.random.key(5), len(params))
    direction = {n: mx.random.normal(p.shape, key=k) for (n, p), k in zip(params.items(), keys, strict=True)}

    def loss(scale):
        moved = {n: p + scale * direction[n] for n, p in params.items()}
        return learner(moved).meta_gradient(stack)[0]["query_loss"].item()

    numeric = (loss(5e-3) - loss(-5e-3)) / 1e-2
    exact, first = (sum(mx.sum(g[f"model/{n}"] * d).item() for n, d in direction.items()) for g in (grads, first_order))
    assert abs(numeric - exact) <= 1e-3 * abs(exact)
    assert abs(numeric - first) > 0.05 * abs(exact)


def test_anil_over_everything_is_maml():
    model, stack = SimpleClassifier(hidden_dim=8), planes(3)
    everything = ANILLearner(model, inner_lr=0.1, adapts=["*"]).meta_gradient(stack)[1]
    close(everything, MAMLLearner(model, inner_lr=0.1).meta_gradient(stack)[1])


def test_anil_changes_the_head_alone():
    model, stack = SimpleClassifier(hidden_dim=8), planes(1)
    adapted = ANILLearner(model, inner_lr=0.1).adapt(stack.support_x[0], stack.support_y[0])
    before, after = trainable(model), trainable(adapted)
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_reptile_with_sgd_is_the_literal_rule():
    model, stack = MLP(hidden_dim=8), sines(3)
    learner = ReptileLearner(model, inner_lr=0.05, outer_lr=0.5, num_inner_steps=3, outer_optimizer="sgd")
    before = trainable(model)
    ends = [trainable(learner.adapt(sx, sy)) for sx, sy, _, _ in singles(stack)]
    learner.meta_train_step(stack)
    for name, theta in before.items():
        mean = sum(end[name] for end in ends) / 3
        assert mx.allclose(learner.meta["model"][name], theta + 0.5 * (mean - theta), atol=1e-6)


class Words(nn.Module):
    """Token ids (N, L), through an embedding and dropout."""

    def __init__(self):
        super().__init__()
        table, head = mx.random.split(mx.random.key(0))
        self.table, self.head, self.dropout = nn.Embedding(9, 4), nn.Linear(4, 2), Dropout(0.3)
        self.table.weight = mx.random.normal((9, 4), key=table)
        self.head.weight = mx.random.normal((2, 4), key=head)

    def __call__(self, ids):
        return self.head(mx.tanh(self.dropout(self.table(ids)).mean(axis=1)))


def words(count: int) -> EpisodeStack:
    ids, labels = mx.random.randint(0, 9, (count, 6, 3), key=mx.random.key(0)), mx.tile(mx.arange(6) % 2, (count, 1))
    return EpisodeStack(ids, labels, ids + 0, labels)


@pytest.mark.parametrize("checkpoint", [4, True, None])
@pytest.mark.parametrize(("model", "stack"), [(MLP(hidden_dim=8), sines(1)), (Words(), words(1))], ids=["mlp", "words"])
def test_checkpointing_changes_no_number(model, stack, checkpoint, peak_bytes):
    def gradient(checkpoint):
        learner = MAMLLearner(model, inner_lr=0.05, num_inner_steps=9, checkpoint=checkpoint, compile=False)
        grads = learner.meta_gradient(stack)[1]
        mx.eval(grads)
        return grads, peak_bytes(lambda: mx.eval(learner.meta_gradient(stack)[1]))

    plain, kept = gradient(False)
    again, needed = gradient(checkpoint)
    close(again, plain, 1e-6)
    assert needed < kept  # that is, something was computed again


def test_a_peak_is_measured_once_the_device_has_ended_what_came_before(monkeypatch):
    """Only then has a GPU freed what that held."""
    calls = []
    for name in ("synchronize", "get_active_memory"):
        own = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda name=name, own=own: calls.append(name) or own())
    graphs._peak_bytes(lambda: mx.ones(8))
    assert calls == ["synchronize", "get_active_memory"]


LEARNERS = [ReptileLearner, MAMLLearner, FOMAMLLearner, ANILLearner]


@pytest.mark.parametrize("cls", LEARNERS)
def test_stack_equals_loop_equals_eager(cls):
    model, stack = SimpleClassifier(hidden_dim=8), planes(5)
    stacked = cls(model, chunk=5).meta_gradient(stack)
    for other in (
        cls(model, chunk=1).meta_gradient(stack),
        cls(model, chunk=2).meta_gradient(singles(stack)),
        cls(model, chunk=5, compile=False).meta_gradient(stack),
    ):
        close(other[1], stacked[1])
        close(other[0], stacked[0])


def test_a_step_in_chunks_is_the_whole_step():
    one, other = (MAMLLearner(SimpleClassifier(hidden_dim=8), chunk=chunk) for chunk in (4, 1))
    first, second = one.meta_train_step(planes(4)), other.meta_train_step(planes(4))
    assert first == pytest.approx(second, rel=1e-4)
    close(one.meta["model"], other.meta["model"], 1e-4)


def test_tasks_of_unequal_shape_are_one_meta_batch():
    model = SimpleClassifier(hidden_dim=8)
    both = MAMLLearner(model).meta_gradient([*singles(planes(2)), *singles(planes(3, support=4))])[1]
    a, b = (MAMLLearner(model).meta_gradient(stack)[1] for stack in (planes(2), planes(3, support=4)))
    close(both, {name: (2 * a[name] + 3 * b[name]) / 5 for name in a})


def test_same_seed_same_bits_and_dropout_differs_by_task():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = Dropout(0.5), nn.Linear(2, 2)
            self.head.weight, self.head.bias = mx.eye(2), mx.zeros(2)

        def __call__(self, x):
            return self.head(self.drop(x))

    def run(seed):
        learner = MAMLLearner(Noisy(), inner_lr=0.1, seed=seed)
        return [learner.meta_train_step(planes(3, seed=i)) for i in range(3)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_metrics_and_clipping():
    metrics = MAMLLearner(SimpleClassifier(), outer_optimizer="sgd", outer_lr=1.0, gradient_clip=0.01).meta_train_step(
        singles(planes(4)), cross_entropy_loss
    )
    assert set(metrics) == {"query_loss", "support_loss", "query_accuracy", "param_diff", "grad_norm"}
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["grad_norm"] > 0.01
    assert metrics["param_diff"] == pytest.approx(0.01, rel=1e-3)
    assert "query_accuracy" not in MAMLLearner(MLP()).meta_train_step(sines(2))


def test_schedule_and_own_optimizer():
    learner = MAMLLearner(MLP(hidden_dim=8), outer_lr=optim.linear_schedule(0.1, 0.0, 2), outer_optimizer="sgd")
    moves = [learner.meta_train_step(sines(2))["param_diff"] for _ in range(4)]
    assert moves[0] > 0
    assert moves[3] == 0
    own = MAMLLearner(MLP(hidden_dim=8), outer_optimizer=optim.SGD(0.1))
    assert own.meta_train_step(sines(2))["param_diff"] == pytest.approx(moves[0], rel=1e-5)


def test_evaluate_reports_every_number_of_steps():
    learner, stack = MAMLLearner(SimpleClassifier(), inner_lr=0.1), planes(6)
    report = learner.evaluate(stack, cross_entropy_loss)
    expected = {f"step_{k}_{m}{ci}" for k in (0, 1, 3, 5, 10) for m in ("acc", "loss") for ci in ("", "_ci95")}
    assert set(report) == expected | {"final_loss"}
    assert report["final_loss"] == report["step_10_loss"]
    by_hand = []
    for sx, sy, qx, qy in singles(stack):
        by_hand.append(cross_entropy_loss(learner.adapt(sx, sy, num_steps=3)(qx), qy).item())
    assert report["step_3_loss"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert report["step_3_loss_ci95"] == pytest.approx(2.571 * np.std(by_hand, ddof=1) / 6**0.5, rel=1e-4)


def test_adapt_leaves_the_learner_alone_and_takes_a_pair():
    learner, stack = MAML(SimpleClassifier(), lr_inner=0.1, lr_outer=0.01), planes(1)
    x, y = stack.support_x[0], stack.support_y[0]
    before = {name: mx.array(value) for name, value in trainable(learner.model).items()}
    one, other = learner.adapt((x, y), num_steps=5), learner.adapt(x, y, num_steps=5)
    close(trainable(one), trainable(other), 0)
    close(trainable(learner.model), before, 0)
    assert cross_entropy_loss(one(x), y).item() < cross_entropy_loss(learner.model(x), y).item()


def test_frozen_weights_stay_and_only_trainable_ones_adapt():
    model = SimpleClassifier(hidden_dim=8)
    model.layers[0].freeze()
    frozen = mx.array(model.layers[0].weight)
    learner = MAMLLearner(model)
    learner.meta_train_step(planes(3))
    assert not any("layers.0" in name for name in learner.state())
    assert mx.array_equal(learner.model.layers[0].weight, frozen)
    model.freeze()
    with pytest.raises(ModelError, match="no trainable parameters"):
        MAMLLearner(model)


def test_save_and_load_continue_bit_for_bit(tmp_path):
    straight = MAMLLearner(SimpleClassifier(hidden_dim=8), seed=3)
    for i in range(6):
        straight.meta_train_step(planes(4, seed=i))
    first = MAMLLearner(SimpleClassifier(hidden_dim=8), seed=3)
    for i in range(3):
        first.meta_train_step(planes(4, seed=i))
    first.save(tmp_path / "half.npz")
    second = MAMLLearner(SimpleClassifier(hidden_dim=8, key=mx.random.key(9)), seed=5)
    second.load(tmp_path / "half.npz")
    assert second.iteration == 3
    for i in range(3, 6):
        second.meta_train_step(planes(4, seed=i))
    a, b = straight.state(), second.state()
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(tmp_path):
    MAMLLearner(SimpleClassifier(hidden_dim=8)).save(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight' is \(8, 2\) float32, expected \(9, 2\)"):
        MAMLLearner(SimpleClassifier(hidden_dim=9)).load(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="made by 'maml', not by 'reptile'"):
        ReptileLearner(SimpleClassifier(hidden_dim=8)).load(tmp_path / "a.npz")


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    path = tmp_path / "a.npz"

    def net(**options):
        return PrototypicalNetwork(SimpleClassifier(hidden_dim=8), **options)

    net().save(path)
    net(distance_metric="euclidean").load(path)  # as by default
    with pytest.raises(CheckpointError, match=r"saved with distance_metric 'euclidean', and this learner has 'cosine'"):
        net(distance_metric="cosine").load(path)
    cosine = net(distance_metric="cosine")
    cosine.take_over(path, *read_npz(path))  # a configuration may say otherwise
    assert cosine.options == {"distance_metric": "cosine"}

    MetaSGDLearner(SimpleClassifier(hidden_dim=8), rate_range=(0.01, 0.02)).save(path)
    MetaSGDLearner(SimpleClassifier(hidden_dim=8), rate_range=(0.01, 0.02)).load(path)
    with pytest.raises(CheckpointError, match=r"rate_range \[0.01, 0.02\], and this learner has \[0.01, 0.03\]"):
        MetaSGDLearner(SimpleClassifier(hidden_dim=8), rate_range=(0.01, 0.03)).load(path)

    MAMLLearner(SimpleClassifier(hidden_dim=8), 0.4, num_inner_steps=1, checkpoint=True).save(path)
    other = MAMLLearner(SimpleClassifier(hidden_dim=8), 0.1)
    other.load(path)  # `checkpoint` changes no number
    assert (other.inner_lr, other.num_inner_steps) == (0.1, 5)
    arrays, header = read_npz(path)
    del header["learner"]["options"]
    write_npz(path, arrays, {"learner": header["learner"]})
    other.load(path)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_loaded_learner_keeps_its_own_outer_rate(tmp_path, optimizer):
    def learner(rate):
        return MAMLLearner(SimpleClassifier(hidden_dim=8), outer_lr=rate, outer_optimizer=optimizer)

    first, stack = learner(0.001), planes(4)
    first.meta_train_step(stack)
    first.save(tmp_path / "a.npz")
    moves = []
    for rate in (0.001, 0.1):
        again = learner(rate)
        again.load(tmp_path / "a.npz")
        moves.append(again.meta_train_step(stack)["param_diff"])
    assert moves[0] == first.meta_train_step(stack)["param_diff"]
    assert moves[1] == pytest.approx(100 * moves[0], rel=1e-3)


def test_a_loaded_schedule_goes_on_at_its_step(tmp_path):
    def learner():
        return MAMLLearner(SimpleClassifier(hidden_dim=8), outer_lr=optim.linear_schedule(0.1, 0.0, 10), compile=False)

    first, again, stack = learner(), learner(), planes(4)
    for _ in range(3):
        first.meta_train_step(stack)
    first.save(tmp_path / "a.npz")
    again.load(tmp_path / "a.npz")
    assert again.state()["optimizer/learning_rate"].item() == first.state()["optimizer/learning_rate"].item() < 0.1
    assert again.meta_train_step(stack) == first.meta_train_step(stack)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"inner_lr": -1}, "inner_lr must be a positive number"),
        ({"outer_lr": float("nan")}, "outer_lr must be a positive number"),
        ({"num_inner_steps": -1}, "num_inner_steps must be a whole number"),
        ({"num_inner_steps": float("nan")}, "num_inner_steps must be a whole number"),
        ({"num_inner_steps": 1.5}, "num_inner_steps must be a whole number"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1"),
        ({"frist_order": True}, "did you mean 'first_order'"),
        ({"outer_optimizer": "adan"}, "did you mean 'adam'"),
        (
            {"outer_optimizer": optim.MultiOptimizer([optim.SGD(0.1), optim.Adam(0.1)], [lambda *_: True])},
            "one for all that is meta-learned, got a MultiOptimizer",
        ),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": "x"}, "got 'x'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        MAMLLearner(SimpleClassifier(), **arguments)


@pytest.mark.parametrize(
    ("algorithm", "options", "sentence"),
    [
        ("reptile", {"inner_batch_size": "abc"}, "option 'inner_batch_size' should be a valid integer"),
        ("reptile", {"inner_batch_size": 0}, "should be greater than or equal to 1, got 0"),
        ("reptile", {"use_query": "maybe"}, "option 'use_query' should be a valid boolean"),
        ("anil", {"adapts": 5}, "option 'adapts' should be a valid list"),
        ("imaml", {"cg_steps": -1}, "got -1"),
        ("imaml", {"strength": float("nan")}, "should be a finite number"),
        ("reptile", {"chunk": "abc"}, "chunk must be a whole number of at least 1, got 'abc'"),
        ("reptile", {"inner_lr": "abc"}, "inner_lr must be a positive number, got 'abc'"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(algorithm, options, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        learner_class(algorithm)(SimpleClassifier(), **options)


def test_options_are_read_as_they_are_annotated():
    assert learner_class("meta_sgd")(SimpleClassifier(), rate_range=[0.01, 0.02]).options == {
        "rate_range": (0.01, 0.02)
    }


def test_impossible_numbers_of_steps_are_refused():
    learner, episodes = MAMLLearner(SimpleClassifier(hidden_dim=8)), singles(planes(2))
    for call, name in (
        (lambda: learner.adapt(episodes[0][:2], num_steps=-1), "num_steps"),
        (lambda: learner.meta_train(episodes, num_iterations=-1), "num_iterations"),
        (lambda: learner.meta_train(episodes, meta_batch_size=0), "meta_batch_size"),
    ):
        with pytest.raises(ConfigurationError, match=f"{name} must be a whole number"):
            call()
    assert learner.iteration == 0
    for steps in (5, (), (2.5,), (-1, 5), "05", ("5",)):
        for call in (learner.evaluate, learner.evaluate_per_task):
            with pytest.raises(ConfigurationError, match="num_adaptation_steps must be whole numbers of at least 0"):
                call(episodes, num_adaptation_steps=steps)


def test_whole_numbers_may_be_floats():
    one, other = (MAMLLearner(SimpleClassifier(hidden_dim=8), chunk=chunk) for chunk in (2, 2.0))
    episodes = singles(planes(4))
    x, y = episodes[0][:2]
    close(trainable(one.adapt(x, y, num_steps=2)), trainable(other.adapt(x, y, num_steps=2.0)), 0)
    assert one.evaluate(episodes, num_adaptation_steps=(0, 2)) == other.evaluate(
        episodes, num_adaptation_steps=(0.0, 2.0)
    )
    histories = one.meta_train(episodes, None, 2), other.meta_train(episodes, None, 2.0, meta_batch_size=4.0)
    assert histories[0] == histories[1]


def test_numpy_arrays_are_taken_as_they_are():
    stack = planes(3)
    arrays = [tuple(np.array(part) for part in episode) for episode in singles(stack)]
    wide = [(sx.astype(np.float64), sy.astype(np.int64), qx, qy) for sx, sy, qx, qy in arrays]
    expected = MAMLLearner(SimpleClassifier(hidden_dim=8)).meta_train_step(singles(stack))
    for episodes in (arrays, wide):
        learner = MAMLLearner(SimpleClassifier(hidden_dim=8))
        assert learner.meta_train_step(episodes) == pytest.approx(expected, rel=1e-6)
        adapted = learner.adapt(*episodes[0][:2])
        close(trainable(adapted), trainable(learner.adapt(stack.support_x[0], stack.support_y[0])), 1e-6)


def test_bad_episodes_are_refused():
    learner = MAMLLearner(SimpleClassifier())
    x, y = mx.zeros((3, 2)), mx.zeros((3,), dtype=mx.int32)
    for episodes, sentence in (
        ([], "no episodes"),
        ([(x, y, x)], "has 3 parts"),
        ([(x, y[:2], x, y)], "support_x has 3 rows and support_y 2"),
        ((x, y, x, y), "expected a list of episodes"),
    ):
        with pytest.raises(TaskSamplingError, match=sentence):
            learner.meta_train_step(episodes)


def test_as_stacks_groups_by_shape():
    stacks = as_stacks([*singles(planes(2)), *singles(planes(1, support=3)), *singles(planes(2, seed=1))])
    assert [stack.num_tasks for stack in stacks] == [4, 1]


def test_meta_train_over_a_list_of_episodes():
    learner = ReptileLearner(SimpleClassifier(hidden_dim=8))
    history = learner.meta_train(singles(planes(10)), meta_batch_size=4)
    assert len(history["query_loss"]) == learner.iteration == 3
    learner.meta_train(singles(planes(10)), num_iterations=5)
    assert learner.iteration == 8


@pytest.mark.parametrize(("budget", "stacked"), [(1, False), (1 << 40, True)])
def test_a_large_model_is_not_measured_by_a_stack_of_it(monkeypatch, budget, stacked):
    """One gradient of the outputs says enough where that alone is too large."""
    monkeypatch.setattr(graphs, "memory_budget", lambda: budget)
    learner = learner_class("maml")(SimpleClassifier(hidden_dim=8, num_classes=2), num_inner_steps=1, compile=False)
    measured = []
    gradient = graphs.Graphs._gradient
    monkeypatch.setattr(
        graphs.Graphs, "_gradient", lambda self, loss, made: measured.append(loss) or gradient(self, loss, made)
    )
    x, y = mx.ones((3, 4, 2)), mx.zeros((3, 4), dtype=mx.int32)
    fit = learner._graphs._chunk_of(EpisodeStack(x, y, x, y), learner.meta, None)
    assert (fit, bool(measured)) == ((3, True) if stacked else (1, False))


@pytest.mark.parametrize("label", [2, -1, 2**32 + 1])
def test_a_class_that_the_model_has_no_output_for_is_refused(label):
    learner = MAMLLearner(SimpleClassifier(hidden_dim=4))
    x = mx.zeros((3, 2))
    good, bad = mx.array([0, 1, 1]), mx.array([0, 1, label], dtype=mx.int64)
    for call in (
        lambda: learner.adapt(x, bad),
        lambda: learner.evaluate([(x, good, x, bad)]),
        lambda: learner.meta_train_step([(x, bad, x, good)]),
    ):
        with pytest.raises(TaskSamplingError, match="SimpleClassifier has 2 outputs: classes are 0 … 1"):
            call()
    assert learner.iteration == 0

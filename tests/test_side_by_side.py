"""Tasks on several threads of a CPU: the same numbers as one after the other, in order, and nothing left behind."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import LoRAConfig, MAMLLearner, SimpleClassifier, attach
from efficientai_toolkit.devices import blas_threads, one_blas_thread
from efficientai_toolkit.learners import graphs, side_by_side
from efficientai_toolkit.tasks.episode import EpisodeStack


class Owner:
    pass


def squares(kept):
    return kept.setdefault("square", mx.compile(lambda x: mx.square(x) + 1))


def numbers(count):
    calls = [(mx.array(float(i)),) for i in range(count)]
    mx.eval(calls)
    return calls


@pytest.fixture
def two_threads(monkeypatch):
    """Whatever the BLAS of this machine allows."""
    monkeypatch.setattr(graphs, "workers", lambda count: min(count, 2))


def episodes(tasks=5):
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(tasks, 8, 2)).astype(np.float32))
    return EpisodeStack(x, (x[..., 0] > 0).astype(mx.int32), x + 0.1, (x[..., 0] > 0).astype(mx.int32))


def test_results_come_in_the_order_of_the_calls():
    found = [y.item() for y in side_by_side.side_by_side(Owner(), squares, numbers(9), 2)]
    assert found == [i * i + 1 for i in range(9)]


def test_an_error_reaches_the_caller_and_the_threads_go_on():
    def failing(kept):
        def call(x):
            if x.item() == 2:
                raise ValueError("the third")
            return x

        return call

    before = blas_threads()
    with pytest.raises(ValueError, match="the third"):
        list(side_by_side.side_by_side(Owner(), failing, numbers(5), 2))
    assert blas_threads() == before
    assert len(list(side_by_side.side_by_side(Owner(), squares, numbers(3), 2))) == 3


def test_one_thread_of_blas_within():
    before = blas_threads()
    with one_blas_thread():
        assert blas_threads() == 1
    assert blas_threads() == before


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
def test_gradients_and_evaluations_are_those_of_one_thread(two_threads, monkeypatch, compiled, adapted):
    def learner():
        mx.random.seed(0)
        model = SimpleClassifier(hidden_dim=8)
        if adapted:
            attach(model, LoRAConfig(rank=2), ["layers.0"], train_head=True)
        return MAMLLearner(model, inner_lr=0.1, num_inner_steps=2, chunk=1, compile=compiled)

    def everything():
        made = learner()
        metrics = [made.meta_update([episodes()]) for _ in range(3)]
        return metrics, made.state(), made.evaluate_per_task(episodes(), None, (0, 2))

    beside = everything()
    monkeypatch.setattr(graphs, "workers", lambda count: 1)
    alone = everything()
    for (path, a), (_, b) in zip(*(sorted(state.items()) for _, state, _ in (beside, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=path)
    for name, values in alone[2].items():
        np.testing.assert_allclose(beside[2][name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    assert [m["query_loss"].item() for m in beside[0]] == pytest.approx([m["query_loss"].item() for m in alone[0]])


def test_a_learner_that_is_gone_leaves_no_graph_on_the_threads(two_threads):
    learner = MAMLLearner(SimpleClassifier(hidden_dim=4), chunk=1, num_inner_steps=1)
    learner.meta_update([episodes()])
    gone = weakref.ref(learner._graphs)
    del learner
    gc.collect()
    assert gone() is None


def test_on_a_gpu_tasks_are_not_spread(monkeypatch):
    monkeypatch.setattr(side_by_side.mx, "default_device", lambda: mx.gpu)
    assert side_by_side.workers(8) == 1

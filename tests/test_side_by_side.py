"""Tasks on several threads of a CPU: the same numbers as one after the other, in order, and nothing left behind."""

import gc
import signal
import threading
import time
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
    """Tasks one by one on two threads of the CPU, whatever there is and the BLAS of this machine allows."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    monkeypatch.setattr(graphs, "memory_budget", lambda: 1)
    monkeypatch.setattr(graphs, "workers", lambda count, each: min(count, 2))
    yield
    mx.set_default_device(before)


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


needs_threads = pytest.mark.skipif(blas_threads() < 2, reason="the BLAS here has one thread, or none to set")


@needs_threads
def test_one_thread_of_blas_within():
    before = blas_threads()
    with one_blas_thread():
        assert blas_threads() == 1
    assert blas_threads() == before


@needs_threads
def test_the_blas_has_its_threads_again_while_an_error_is_kept(two_threads, monkeypatch):
    before, adding = blas_threads(), graphs.tree_map

    def failing(function, *trees):
        assert blas_threads() == 1
        raise KeyboardInterrupt

    learner = MAMLLearner(SimpleClassifier(hidden_dim=4))
    monkeypatch.setattr(graphs, "tree_map", failing)
    with pytest.raises(KeyboardInterrupt) as kept:
        learner.meta_gradient([episodes()])
    assert kept.value.__traceback__ is not None
    assert blas_threads() == before
    monkeypatch.setattr(graphs, "tree_map", adding)
    learner.meta_gradient([episodes()])


def test_an_interrupt_waits_for_what_is_being_traced():
    begun, ended = threading.Event(), threading.Event()

    def slow(kept):
        def call(x):
            begun.set()
            time.sleep(0.5)  # as if it were tracing: within the lock
            ended.set()
            return x

        return call

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            list(side_by_side.side_by_side(Owner(), slow, numbers(1), 2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert begun.is_set()
    assert ended.is_set()


def test_no_more_results_at_once_than_asked_for():
    now, most, lock = 0, 0, threading.Lock()

    def counted(kept):
        def call(x):
            nonlocal now, most
            with lock:
                now, most = now + 1, max(most, now + 1)
            return x

        return call

    for _ in side_by_side.side_by_side(Owner(), counted, numbers(7), 2):
        with lock:
            now -= 1
    assert most <= 3  # two being computed or waiting, and the one in hand


def test_memory_and_what_is_not_known_of_it_bound_the_threads(monkeypatch):
    monkeypatch.setattr(side_by_side, "blas_threads", lambda: 8)
    monkeypatch.setattr(side_by_side, "total_memory", lambda: 100)
    monkeypatch.setattr(side_by_side.mx, "default_device", lambda: mx.cpu)
    assert [side_by_side.workers(count, each) for count, each in ((4, 1), (9, 1), (9, 20), (9, 200), (9, 0))] == [
        4,
        8,
        2,
        1,
        1,
    ]


def test_arrays_that_a_loss_or_a_model_holds_unevaluated_are_no_obstacle(two_threads, monkeypatch):
    # Measuring a task evaluates them; a learner that was loaded has been measured.
    monkeypatch.setattr(graphs.Graphs, "_measure", lambda *_: 1 << 20)

    class Scaled(SimpleClassifier):
        def __init__(self):
            super().__init__(hidden_dim=4)
            self._scale = mx.arange(2) * 0.5 + 1

        def __call__(self, x):
            return super().__call__(x) * self._scale

    weights = mx.ones((2,)) * 2.0

    def weighted(predictions, targets):
        return mx.mean(weights[targets] * (mx.logsumexp(predictions, axis=-1) - predictions[:, 0]))

    for model, loss in ((SimpleClassifier(hidden_dim=4), weighted), (Scaled(), None)):
        learner = MAMLLearner(model, num_inner_steps=1)
        assert np.isfinite(learner.meta_train_step([episodes()], loss)["query_loss"])
        assert learner._graphs._alone
        assert np.isfinite(learner.meta_train_step([episodes()], loss)["query_loss"])


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
def test_gradients_and_evaluations_are_those_of_one_thread(two_threads, monkeypatch, compiled, adapted):
    def learner():
        mx.random.seed(0)
        model = SimpleClassifier(hidden_dim=8)
        if adapted:
            attach(model, LoRAConfig(rank=2), ["layers.0"], train_head=True)
        return MAMLLearner(model, inner_lr=0.1, num_inner_steps=2, compile=compiled)

    def everything():
        made = learner()
        metrics = [made.meta_update([episodes()]) for _ in range(3)]
        return metrics, made.state(), made.evaluate_per_task(episodes(), None, (0, 2))

    beside = everything()
    monkeypatch.setattr(graphs, "workers", lambda count, each: 1)
    alone = everything()
    for (path, a), (_, b) in zip(*(sorted(state.items()) for _, state, _ in (beside, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=path)
    for name, values in alone[2].items():
        np.testing.assert_allclose(beside[2][name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    assert [m["query_loss"].item() for m in beside[0]] == pytest.approx([m["query_loss"].item() for m in alone[0]])


def test_a_learner_that_is_gone_leaves_no_graph_on_the_threads(two_threads):
    model = SimpleClassifier(hidden_dim=4)
    learner = MAMLLearner(model, num_inner_steps=1)
    learner.meta_update([episodes()])
    held = [weakref.ref(learner._graphs), weakref.ref(learner._graphs.problem(None).apply), weakref.ref(model)]
    del learner, model
    gc.collect()
    assert [ref() for ref in held] == [None, None, None]


def test_a_chunk_that_is_asked_for_is_all_that_is_computed_at_once(two_threads, monkeypatch):
    def none(*_):
        raise AssertionError("side by side")

    monkeypatch.setattr(graphs, "side_by_side", none)
    measured = {graphs._shapes(episodes()): 1}  # as in a checkpoint of a learner without `chunk`
    for chunk in (None, 1):
        learner = MAMLLearner(SimpleClassifier(hidden_dim=4), chunk=chunk)
        learner._task_bytes.update(measured)
        monkeypatch.setattr(graphs, "memory_budget", lambda: 0)
        if chunk is None:
            with pytest.raises(AssertionError, match="side by side"):
                learner.meta_update([episodes()])
        else:
            learner.meta_update([episodes()])


def test_on_a_gpu_tasks_are_not_spread(monkeypatch):
    monkeypatch.setattr(side_by_side.mx, "default_device", lambda: mx.gpu)
    assert side_by_side.workers(8, 1) == 1

"""Meta-steps and evaluations as compiled graphs over stacks of tasks, cut into chunks where a stack would not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..devices import memory_budget
from ..nn.losses import LossFn, accuracy, has_accuracy
from ..nn.statistics import given, recorded
from ..nn.trees import flatten
from ..optimizers import pure_update
from ..precision import widened
from ..tasks.episode import EpisodeStack
from .learner import Learner, Meta, MetaGrad, Metrics, Problem, map_tasks
from .side_by_side import side_by_side, workers


class Graphs:
    """Pure functions of (meta, optimiser state, stacks, counter), traced once for each loss and phase and kept.

    Args:
        learner: the algorithm.
        bind: a loss function (or None) -> the problem.
        optimizer: the outer optimiser; its own state is not used.
        num_steps: inner steps of meta-training.
        by_steps: the learner adapts by steps, in which an evaluation has the model's dropout as meta-training has.
        gradient_clip: largest global norm of the meta-gradient.
        chunk: tasks at once; None measures one task and chooses, and sets chunks side by side on a CPU's cores.
        task_bytes: what was measured, by shapes; filled as stacks come.
        compiled: use `mx.compile`.
    """

    def __init__(
        self,
        learner: Learner,
        bind: Callable[[LossFn | None], Problem],
        optimizer: optim.Optimizer,
        *,
        num_steps: int,
        by_steps: bool,
        gradient_clip: float | None,
        chunk: int | None,
        task_bytes: dict[str, int],
        compiled: bool,
    ):
        self.learner, self.optimizer, self.num_steps, self.by_steps = learner, optimizer, num_steps, by_steps
        self.gradient_clip, self.chunk, self.task_bytes = gradient_clip, chunk, task_bytes
        self._bind, self._compiled = bind, compiled
        self._problems: dict[Any, Problem] = {}
        self._functions: dict[Any, Callable] = {}
        self._alone: set[Any] = set()  # names of functions that only this thread can run

    def problem(self, loss_fn: LossFn | None) -> Problem:
        name = _name(loss_fn)
        if name not in self._problems:
            self._problems[name] = self._bind(loss_fn)
        return self._problems[name]

    def update(
        self,
        meta: Meta,
        state: Any,
        stacks: Sequence[EpisodeStack],
        loss_fn: LossFn | None,
        counter: mx.array,
        iteration: int,
        support_loss: bool,
    ) -> tuple[Metrics, Meta, Any]:
        """One outer step: (metrics, new meta, new optimiser state). `counter` (seed, iteration) is its key.

        Without `support_loss` that metric, a forward pass of the support, is not computed.
        """
        if len(stacks) == 1 and self._chunk_of(stacks[0], meta, loss_fn) >= stacks[0].num_tasks:
            meta_grad = self.learner.meta_grad_at(iteration)
            name = ("step", _name(loss_fn), meta_grad, support_loss)
            step = self._function(name, lambda: self._whole_step(loss_fn, meta_grad, support_loss))
            return step(meta, state, counter, tuple(stacks[0]))
        metrics, grads = self.gradient(meta, stacks, loss_fn, counter, iteration, support_loss)
        norms, meta, state = self._function("apply", lambda: self._apply)(meta, state, grads)
        return metrics | norms, meta, state

    def gradient(
        self,
        meta: Meta,
        stacks: Sequence[EpisodeStack],
        loss_fn: LossFn | None,
        counter: mx.array,
        iteration: int,
        support_loss: bool = True,
    ) -> tuple[Metrics, Meta]:
        """Mean meta-gradient over all tasks, chunk by chunk; each is evaluated before the next is begun."""
        parts = [part for stack in stacks for part in stack.chunks(self._chunk_of(stack, meta, loss_fn))]
        sizes = [part.num_tasks for part in parts]
        ends = list(itertools.accumulate(sizes))
        keys, grads = mx.random.split(counter, ends[-1]), None
        meta_grad = self.learner.meta_grad_at(iteration)
        calls = [
            (meta, keys[end - n : end], counter[1], tuple(part))
            for part, n, end in zip(parts, sizes, ends, strict=True)
        ]
        rows: list[tuple[int, Metrics]] = []
        name = ("gradient", _name(loss_fn), meta_grad, support_loss)
        with closing(self._each(name, lambda: self._gradient(loss_fn, meta_grad, support_loss), calls)) as found:
            for n, (metrics, more) in zip(sizes, found, strict=True):
                more = tree_map(lambda g, n=n: g * (n / ends[-1]), more)
                grads = more if grads is None else tree_map(mx.add, grads, more)
                mx.eval(grads, metrics)
                rows.append((n, metrics))
        return _weighted_means(rows), grads  # type: ignore[return-value]

    def evaluate(
        self,
        meta: Meta,
        stacks: Sequence[EpisodeStack],
        loss_fn: LossFn | None,
        steps: tuple[int, ...],
        seed: int,
        transductive: bool = True,
    ) -> dict[str, np.ndarray]:
        """`step_{k}_loss` and `step_{k}_acc` of every task, each (tasks,), after each number of inner steps."""
        rows: dict[str, list[np.ndarray]] = {}
        calls, seen = [], 0
        for stack in stacks:
            for part in stack.chunks(self._chunk_of(stack, meta, loss_fn, evaluating=True)):
                calls.append((meta, _task_keys(seed, seen, part.num_tasks), tuple(part)))
                seen += part.num_tasks
        with closing(
            self._each(
                ("evaluate", _name(loss_fn), steps, transductive),
                lambda: self._evaluation(loss_fn, steps, transductive),
                calls,
            )
        ) as found:
            for metrics in found:
                for name, values in metrics.items():
                    rows.setdefault(name, []).append(np.array(values))
        return {name: np.concatenate(values) for name, values in rows.items()}

    def _each(self, name: Any, make: Callable[[], Callable], calls: Sequence[tuple[Any, ...]]) -> Generator[Any]:
        """What the function `name` returns for each call, whose last argument is a stack; in order."""
        count, done = self._at_once(name, [call[-1] for call in calls]), 0
        if count > 1:
            mx.eval(calls)
            try:
                with closing(
                    side_by_side(self, lambda kept: self._function(name, make, kept), calls, count)
                ) as results:
                    for result in results:
                        done += 1
                        yield result
            except RuntimeError as error:
                # A loss or a model that holds an array not yet evaluated, which only the thread that made it can do.
                if "Stream" not in str(error):
                    raise
                self._alone.add(name)
        for call in calls[done:]:
            yield self._function(name, make)(*call)

    def _at_once(self, name: Any, stacks: Sequence[Sequence[mx.array]]) -> int:
        """Chunks that go side by side, by the measured size of their tasks."""
        if self.chunk is not None or name in self._alone:
            return 1
        sizes = [len(stack[0]) * self.task_bytes.get(_shapes(stack), 0) for stack in stacks]
        return workers(len(stacks), max(sizes)) if all(sizes) else 1

    def _function(self, name: Any, make: Callable[[], Callable], kept: dict[Any, Callable] | None = None) -> Callable:
        kept = self._functions if kept is None else kept
        if name not in kept:
            kept[name] = mx.compile(make()) if self._compiled else make()
        return kept[name]

    def _gradient(self, loss_fn: LossFn | None, meta_grad: MetaGrad, support_loss: bool = True) -> Callable:
        problem, learner, num_steps = self.problem(loss_fn), self.learner, self.num_steps

        def gradient(meta, keys, iteration, stack):
            metrics, grads = meta_grad(
                learner, problem, meta, EpisodeStack(*stack), keys=keys, num_steps=num_steps, iteration=iteration
            )
            # What a compiled function does not return is not computed.
            wanted = {name: mx.mean(m) for name, m in metrics.items() if support_loss or name != "support_loss"}
            return wanted, grads

        return gradient

    def _whole_step(self, loss_fn: LossFn | None, meta_grad: MetaGrad, support_loss: bool) -> Callable:
        gradient = self._gradient(loss_fn, meta_grad, support_loss)

        def step(meta, state, counter, stack):
            keys = mx.random.split(counter, stack[0].shape[0])
            metrics, grads = gradient(meta, keys, counter[1], stack)
            norms, meta, state = self._apply(meta, state, grads)
            return metrics | norms, meta, state

        return step

    def _apply(self, meta: Meta, state: Any, grads: Meta) -> tuple[Metrics, Meta, Any]:
        norm = _norm(grads)
        if self.gradient_clip is not None:
            scale = mx.minimum(1.0, self.gradient_clip / (norm + 1e-6))
            grads = tree_map(lambda g: g * scale, grads)
        new, state = pure_update(self.optimizer, state, grads, meta)
        return {"param_diff": _norm(tree_map(mx.subtract, new, meta)), "grad_norm": norm}, new, state

    def _evaluation(self, loss_fn: LossFn | None, steps: tuple[int, ...], transductive: bool) -> Callable:
        problem, learner = self.problem(loss_fn), self.learner

        def predict(state, sx, qx):
            if transductive:
                return learner.predict(problem, state, qx)
            with recorded() as statistics:
                learner.predict(problem, state, sx)
            with given(statistics):
                return learner.predict(problem, state, qx)

        def task(meta, sx, sy, qx, qy, key):
            key = key if self.by_steps else None  # no dropout in a closed form: the queries have none either
            fast: dict[int, Any] = {}
            last = learner.adapt(problem, meta, sx, sy, key=key, num_steps=steps[-1], each=fast.__setitem__)
            metrics, made = {}, {}
            for k in steps:
                state = fast.get(k, last)  # what adapts in closed form has one for every k
                if id(state) not in made:
                    made[id(state)] = predict(state, sx, qx)
                predictions = made[id(state)]
                metrics[f"step_{k}_loss"] = problem.criterion(predictions, qy)
                if has_accuracy(predictions, qy):
                    metrics[f"step_{k}_acc"] = accuracy(predictions, qy)
            return metrics

        return lambda meta, keys, stack: map_tasks(task, meta, EpisodeStack(*stack), keys)

    def _chunk_of(self, stack: EpisodeStack, meta: Meta, loss_fn: LossFn | None, evaluating: bool = False) -> int:
        """Tasks a graph: all of them where they fit in the device's budget, else as many as do (on a CPU: one)."""
        count = stack.num_tasks
        if self.chunk is not None or count == 1:
            return min(self.chunk or 1, count)
        shapes = _shapes(stack)
        if shapes not in self.task_bytes:
            self.task_bytes[shapes] = self._measure(stack, meta, loss_fn)
        fit = max(1, memory_budget() // max(1, self.task_bytes[shapes]))
        if fit >= count or (evaluating and fit >= 8):
            return min(fit, count)
        return 1 if mx.default_device() == mx.cpu else fit

    def _measure(self, stack: EpisodeStack, meta: Meta, loss_fn: LossFn | None) -> int:
        """Peak bytes of a task's share in a stack: two tasks' meta-gradient, run once without compiling.

        Two, since a stack is not a loop: it does not take `mx.checkpoint`, and some operations cannot be stacked at
        all (then the answer is more than any budget, and tasks are looped over). Rounded up to a power of two, since
        the peak varies a little from process to process and the same run must cut its stacks alike. Where one
        gradient of the outputs is already too large for two tasks, there is nothing more to find out.
        """
        apply, x = self.problem(loss_fn).apply, stack.support_x[0]
        mx.eval(meta, x)
        # Of the outputs, since labels need not be numbers of outputs: not every learner's loss is that of the model.
        least = _peak_bytes(lambda: mx.grad(lambda params: mx.sum(mx.square(apply(params, x))))(meta["model"]))
        if 2 * least > memory_budget():
            return least
        part = tuple(a[:2] for a in stack)
        keys = mx.random.split(mx.random.key(0), 2)
        mx.eval(part, meta, keys)
        try:
            gradient = self._gradient(loss_fn, self.learner.meta_grad)
            peak = _peak_bytes(lambda: gradient(meta, keys, mx.array(0, dtype=mx.uint32), part))
        except (ValueError, RuntimeError) as error:
            if "vmap" not in str(error):
                raise
            return 1 << 62
        return peak // 2


def _task_keys(seed: int, start: int, count: int) -> mx.array:
    """(count, 2): a key for each of the tasks in places `start` …, whatever other tasks there are."""
    high, low = mx.random.split(mx.array([0, seed & 0xFFFFFFFF], dtype=mx.uint32))[0]
    places = mx.arange(start, start + count, dtype=mx.uint32)
    return mx.stack([mx.broadcast_to(high, places.shape), low + places], axis=1)


def _name(loss_fn: LossFn | None) -> Any:
    """What a loss is kept under: itself, or its identity (the problem holds it) where it has no hash, as a module."""
    try:
        hash(loss_fn)
    except TypeError:
        return id(loss_fn)
    return loss_fn


def _shapes(stack: Sequence[mx.array]) -> str:
    return ",".join(str(a.shape[1:]) for a in stack)


def _peak_bytes(compute: Callable[[], Any]) -> int:
    """Of evaluating what `compute` returns, above what is there before; rounded up to a power of two."""
    mx.synchronize()  # a GPU frees what an evaluation held some time after it
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return 1 << max(0, mx.get_peak_memory() - before).bit_length()


def _norm(tree: Any) -> mx.array:
    flat = mx.concatenate([widened(leaf).reshape(-1) for leaf in flatten(tree).values()])
    return mx.sqrt(flat @ flat)  # a third of the operations of a sum of squares for each array


def _weighted_means(rows: Sequence[tuple[int, Metrics]]) -> Metrics:
    """Means over all tasks of what each group of tasks (count, means) reports; not every group reports everything."""
    means = {}
    for name in dict.fromkeys(name for _, metrics in rows for name in metrics):
        having = [(n, metrics[name]) for n, metrics in rows if name in metrics]
        means[name] = sum(n * value for n, value in having) / sum(n for n, _ in having)  # type: ignore[operator]
    return means

"""One context after the other: the shell that holds the model, the strategy and the compiled training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..errors import ConfigurationError, DataError, DivergenceError
from ..nn.functional import Parameters, functional, trainable, update
from ..nn.trees import check_fit, flatten, unflatten
from ..optimizers import initial_state, outer_optimizer, pure_update
from ..settings import unknown_setting
from .loss import as_input, masks_of, row_losses, to_numpy
from .naive import Naive
from .strategy import Batch, Lesson, Strategy, check

# A loss is looked at (and a graph that grows is cut) every so many steps.
_LOOK_EVERY = 50
_TEST_ROWS = 1024


class ContinualLearner:
    """Learns contexts in turn: a model (all of it, or adapters in a frozen one), one or more strategies, an optimiser.

    Args:
        model: a classifier; what its `trainable_parameters()` are is what learns.
        strategy: one strategy or several, which then compose.
        learning_rate, optimizer: see `outer_optimizer`; default Adam.
        iterations: steps a context.
        batch_size: rows of a step. An epoch is a new order of the rows; its last, incomplete batch is left out.
        reset_optimizer: start each context with a fresh optimiser.
        kind: "task", "domain" or "class"; some strategies differ between them.
        seed: of everything random.
        compile: use `mx.compile`.

    >>> learner = ContinualLearner(model, Replay(capacity=200), iterations=500)
    >>> for x, y in contexts:
    ...     learner.learn_task(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy | Sequence[Strategy] | None = None,
        *,
        learning_rate: float = 1e-3,
        iterations: int = 2000,
        batch_size: int = 128,
        optimizer: str | optim.Optimizer | None = None,
        reset_optimizer: bool = False,
        kind: str = "domain",
        seed: int = 0,
        compile: bool = True,
        **unknown: Any,
    ):
        if unknown:
            raise ConfigurationError(unknown_setting(type(self), next(iter(unknown))))
        check(iterations, "iterations", low=1)
        check(batch_size, "batch_size", low=1)
        check(learning_rate, "learning_rate", strict=True)
        if kind not in ("task", "domain", "class"):
            raise ConfigurationError(f"kind={kind!r}: use 'task', 'domain' or 'class'")
        given: list[Strategy] = [strategy] if isinstance(strategy, Strategy) else list(strategy or [Naive()])
        names = [s.name for s in given]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"a strategy is given twice: {', '.join(names)}")
        self.model = model
        self.strategies = {s.name: s for s in given}
        self.iterations, self.batch_size, self.kind, self.seed = iterations, batch_size, kind, seed
        self.reset_optimizer = reset_optimizer
        self.optimizer = outer_optimizer(optimizer, learning_rate)
        self.learned = 0
        params = self.params
        if not params:
            raise ConfigurationError("the model has no trainable parameters")
        for s in given:
            if bind := getattr(s, "bind", None):
                bind(model)
        self._apply = functional(model)
        self._optimizer_state = self._fresh_optimizer(params)
        self._states = {s.name: s.start(params) for s in given}
        self._before: mx.array | None = None
        self._compile = mx.compile if compile else lambda function: function
        self._step = self._compile(self._one_step)
        self._counts = self._compile(self._correct)

    @property
    def params(self) -> Parameters:
        """The trainable weights."""
        return trainable(self.model)

    @property
    def num_parameters(self) -> int:
        return sum(a.size for a in self.params.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of what the strategies keep: examples and arrays as large as the weights."""
        arrays = sum(array.nbytes for array in flatten(self._states).values())
        return arrays + sum(s.memory.nbytes for s in self.strategies.values() if s.memory is not None)

    def learn_task(self, x: Any, y: Any, previous_tasks: Sequence[tuple[Any, Any]] | None = None) -> dict[str, float]:
        """Learn one more context, whose rows may have any of the model's classes.

        Args:
            x, y: (N, …) inputs and (N,) classes.
            previous_tasks: pairs (x, y) that the model knows already and this learner has not learned itself, in
                their order: they are consolidated at the present weights first (EWC's Fisher information, replay's
                memory).

        Returns:
            `loss` of the last steps, `accuracy` on (x, y), `steps`.
        """
        for old_x, old_y in previous_tasks or ():
            lesson = self._lesson(*checked(old_x, old_y), None, None)
            self._finish(lesson)
        return self.learn(x, y)

    def learn(
        self,
        x: Any,
        y: Any,
        *,
        contexts: np.ndarray | None = None,
        active: np.ndarray | None = None,
        each: Callable[[int], None] | None = None,
    ) -> dict[str, float]:
        """Learn one more context.

        Args:
            x, y: (N, …) inputs and (N,) output units.
            contexts: (N,) of each row; default the number of contexts learned so far.
            active: (T, C) the output units that rows of each context may have; default all.
            each: called after every step with their number so far, and with 0 before the first.
        """
        x, y = checked(x, y)
        lesson = self._lesson(x, y, contexts, active)
        columns: dict[str, np.ndarray] = {}
        for name, strategy in self.strategies.items():
            self._states[name], more = strategy.begin(self._states[name], lesson)
            columns |= more
        params = lesson.params
        if self.reset_optimizer:
            self._optimizer_state = self._fresh_optimizer(params)
        rows = {"x": x, "y": y, "context": lesson.contexts, **columns}
        size = min(self.batch_size, len(y))
        draws = np.random.default_rng([self.seed, self.learned, 1])
        memory = np.random.default_rng([self.seed, self.learned, 2])
        keys = mx.random.split(mx.random.key(self.seed * 1_000_003 + self.learned), self.iterations)
        order, at = draws.permutation(len(y)), 0
        losses: list[mx.array] = []
        if each is not None:
            each(0)
        for number in range(self.iterations):
            if at + size > len(y):
                order, at = draws.permutation(len(y)), 0
            batch: Batch = {name: values[order[at : at + size]] for name, values in rows.items()}
            at += size
            current = batch = {
                **batch,
                "weight": np.full(size, 1 / size, np.float32),
                "current": np.ones(size, bool),
            }
            for strategy in self.strategies.values():
                batch = strategy.extend(batch, memory)
            params, self._optimizer_state, self._states, loss, logits = self._step(
                params, self._optimizer_state, self._states, _to_mlx(batch), lesson.active, keys[number]
            )
            losses.append(loss)
            mx.async_eval(params, self._optimizer_state, self._states)
            for strategy in self.strategies.values():
                strategy.observe(current, lambda logits=logits: np.array(logits[:size].astype(mx.float32)), memory)
            if (number + 1) % _LOOK_EVERY == 0:
                self._look(losses, number)
            if each is not None:
                update(self.model, params)
                each(number + 1)
        self._look(losses, self.iterations - 1)
        update(self.model, params)
        self._finish(lesson._replace(params=params))
        recent = losses[-_LOOK_EVERY:]
        return {
            "loss": float(np.mean([np.array(loss) for loss in recent])),
            "accuracy": self.accuracy(x, y, masks_of(lesson.active, mx.array(lesson.contexts))),
            "steps": self.iterations,
        }

    def predict(self, x: Any, active: Any = None) -> mx.array:
        """Logits (N, C) of `x`, with those outside `active` (C,) out of question."""
        parts = []
        x = to_numpy(x)
        for first in range(0, len(x), _TEST_ROWS):
            logits = self._apply(self.params, as_input(mx.array(x[first : first + _TEST_ROWS])))
            parts.append(logits if active is None else mx.where(mx.array(active), logits, -mx.inf))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def accuracy(self, x: Any, y: Any, active: Any = None) -> float:
        """Share of `x` (N, …) whose likeliest class among `active`, (C,) or (N, C), is `y` (N,)."""
        x, y = checked(x, y)
        mask = mx.array([[True]]) if active is None else mx.array(active)
        correct = 0
        params = self.params
        for first in range(0, len(y), _TEST_ROWS):
            part = slice(first, first + _TEST_ROWS)
            here = mask[part] if mask.ndim == 2 and mask.shape[0] > 1 else mask
            correct += int(np.array(self._counts(params, mx.array(x[part]), mx.array(y[part]), here)))
        return correct / len(y)

    def evaluate(self, x: Any, y: Any, active: Any = None, context: int | None = None) -> float:
        """`accuracy`; these weights are the same for every context."""
        return self.accuracy(x, y, active)

    def state(self) -> dict[str, mx.array | np.ndarray]:
        """Every array that a checkpoint between two contexts needs."""
        arrays = flatten(
            {
                "model": self.params,
                "optimizer": self._optimizer_state,
                "strategy": self._states,
                "learned": mx.array(self.learned),
            }
        )
        if self._before is not None:
            arrays["before"] = self._before
        for name, strategy in self.strategies.items():
            if strategy.memory is not None:
                arrays |= {f"memory/{name}/{key}": a for key, a in strategy.memory.state().items()}
        return dict(arrays)

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        """What `state` gave, into a learner made like the one that gave it."""
        arrays = dict(arrays)
        expected = {"model": self.params, "optimizer": self._optimizer_state}
        own = flatten(expected)
        check_fit({n: a for n, a in arrays.items() if n.partition("/")[0] in expected}, own, "this learner")
        new = unflatten(arrays, expected)
        update(self.model, new["model"])
        self._optimizer_state = new["optimizer"]
        self.learned = int(np.array(arrays["learned"]))
        self._before = arrays.get("before")
        for name, strategy in self.strategies.items():
            own = {
                n.removeprefix(f"strategy/{name}/"): a for n, a in arrays.items() if n.startswith(f"strategy/{name}/")
            }
            self._states[name] = _nested(own)
            if strategy.memory is not None:
                prefix = f"memory/{name}/"
                held = {n.removeprefix(prefix): np.array(a) for n, a in arrays.items() if n.startswith(prefix)}
                strategy.memory.load_state(held)

    def _lesson(self, x: np.ndarray, y: np.ndarray, contexts: Any, active: Any) -> Lesson:
        table = mx.array([[True]]) if active is None else mx.array(np.asarray(active, bool))
        return Lesson(
            apply=lambda params, x: self._apply(params, as_input(x)),
            params=self.params,
            x=x,
            y=y,
            contexts=np.full(len(y), self.learned, np.int32) if contexts is None else np.asarray(contexts, np.int32),
            number=self.learned,
            active=table,
            before=table if self._before is None else self._before,
            kind=self.kind,
            rng=np.random.default_rng([self.seed, self.learned, 3]),
        )

    def _finish(self, lesson: Lesson) -> None:
        for name, strategy in self.strategies.items():
            self._states[name] = strategy.end(self._states[name], lesson)
        mx.eval(self._states)
        self._before = lesson.active
        self.learned += 1

    def _look(self, losses: list[mx.array], number: int) -> None:
        if not np.isfinite(losses[-1].item()):
            raise DivergenceError(
                f"the loss became {losses[-1].item()} in context {self.learned}, by step {number + 1}; "
                "lower the learning rate or the strategy's strength"
            )

    def _fresh_optimizer(self, params: Parameters) -> Any:
        return initial_state(self.optimizer, params)

    def _one_step(self, params, optimizer_state, states, batch, active, key):
        def cross_entropy(params, rows):
            logits = self._apply(params, as_input(rows["x"]), key=key)
            losses = row_losses(logits, rows["y"], masks_of(active, rows["context"]))
            return mx.sum(rows["weight"] * losses), logits

        def objective(params):
            loss, logits = cross_entropy(params, batch)
            total = loss
            for name, strategy in self.strategies.items():
                penalty = strategy.penalty(states[name], params, logits, batch)
                total = total if penalty is None else total + penalty
            return total, (loss, logits)

        def loss_grad(rows):
            return mx.grad(lambda params: cross_entropy(params, rows)[0])(params)

        (_, (loss, logits)), grads = mx.value_and_grad(objective)(params)
        for name, strategy in self.strategies.items():
            grads = strategy.gradient(states[name], grads, loss_grad, batch)
        new, optimizer_state = pure_update(self.optimizer, optimizer_state, grads, params)
        states = {name: s.track(states[name], grads, params, new) for name, s in self.strategies.items()}
        return new, optimizer_state, states, loss, logits

    def _correct(self, params, x, y, active):
        logits = self._apply(params, as_input(x))
        return mx.sum(mx.argmax(mx.where(active, logits, -mx.inf), axis=-1) == y)


def checked(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, …) and classes (N,) of a context as arrays of the host.

    Raises:
        DataError: they are not.
    """
    x, y = to_numpy(x), to_numpy(y)
    if len(x) != len(y) or len(y) == 0 or y.ndim != 1:
        raise DataError(f"a context needs rows (N, …) and one class each (N,), got {x.shape} and {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"classes must be integers, got {y.dtype}")
    return x, y.astype(np.int32)


def _to_mlx(batch: Batch) -> Batch:
    return {k: _to_mlx(v) if isinstance(v, dict) else mx.array(v) for k, v in batch.items()}


def _nested(flat: Mapping[str, mx.array]) -> Any:
    """`{"a/b.c": x}` → `{"a": {"b.c": x}}`"""
    nested: dict[str, Any] = {}
    for name, array in flat.items():
        head, _, rest = name.partition("/")
        if rest:
            nested.setdefault(head, {})[rest] = array
        else:
            nested[head] = array
    return nested

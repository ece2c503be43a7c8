"""What every continual-learning method is made of: penalties on the loss, transforms of the batch, of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import ConfigurationError
from ..nn.functional import Parameters
from ..settings import check_whole

State = dict[str, Any]
Batch = dict[str, Any]


class Lesson(NamedTuple):
    """A context as a strategy sees it, before or after it is learned."""

    apply: Callable[..., mx.array]  # (params, x) -> logits (N, C), of inputs as they are stored
    params: Parameters
    x: np.ndarray  # (N, …)
    y: np.ndarray  # (N,) output units
    contexts: np.ndarray  # (N,) the context of each row
    number: int  # contexts learned before this one
    active: mx.array  # (T, C) or (1, 1): the output units that a row of each context may have
    before: mx.array  # `active` while the context before this one was learned
    kind: str  # "task", "domain" or "class"
    rng: np.random.Generator


class Strategy:
    """A continual-learning method as hooks, each of which does nothing here.

    `penalty`, `gradient` and `track` are pure and traced into the training step; `start`, `begin` and `end` give the
    arrays (`state`) that they read, `begin` also columns of rows. `extend` and `observe` work on rows, between steps:
    they are how replay brings in more than the current batch. Several strategies given together compose: penalties
    and rows add, gradient transforms chain.

    A batch is a mapping of rows: `x`, `y`, `context`, `current` (not from a memory), `weight` (of the row's cross
    entropy; those of the current rows sum to 1 at first) and whatever columns strategies add; rows that lack a column
    have zeros in it. A strategy counts and reweights the current rows alone (see `current_rows`). What is itself a
    mapping holds other rows, for `gradient`. `active` is the table of masks.
    """

    name: ClassVar[str]
    memory: Any = None

    def start(self, params: Parameters) -> State:
        """Arrays before the first context."""
        return {}

    def penalty(self, state: State, params: Parameters, logits: mx.array, batch: Batch) -> mx.array | None:
        """What is added to the loss, or None."""
        return None

    def gradient(self, state: State, grads: Parameters, loss_grad: Callable[[Batch], Parameters], batch: Batch):
        """The gradient that the optimiser is given; `loss_grad(rows)` is the cross entropy's on other rows."""
        return grads

    def track(self, state: State, grads: Parameters, old: Parameters, new: Parameters) -> State:
        """`state` after a step from `old` to `new`."""
        return state

    def begin(self, state: State, lesson: Lesson) -> tuple[State, dict[str, np.ndarray]]:
        """`state`, and columns for the rows (N, …), when a context is about to be learned."""
        return state, {}

    def extend(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The batch with more rows, or with other weights."""
        return batch

    def observe(self, batch: Batch, logits: Callable[[], np.ndarray], rng: np.random.Generator) -> None:
        """Look at the current rows after a step; `logits()` are the outputs before it."""

    def end(self, state: State, lesson: Lesson) -> State:
        """`state` after a context has been learned."""
        return state

    def describe(self) -> dict[str, Any]:
        """Name and options, as JSON."""
        options = {key: value for key, value in vars(self).items() if isinstance(value, (bool, int, float, str))}
        return {"name": self.name, **options}


def current_rows(batch: Batch) -> np.ndarray:
    """(N,): which rows are of the context that is learned; those that other strategies brought are not."""
    return batch.get("current", np.ones(len(batch["y"]), bool))


def check(value: float, what: str, *, low: float = 0.0, strict: bool = False) -> float:
    """`value` where it is a finite number not below `low` (with `strict`: above it)."""
    if not (value > low if strict else value >= low):
        raise ConfigurationError(f"{what} must be {'above' if strict else 'at least'} {low:g}, got {value}")
    if math.isinf(value):
        raise ConfigurationError(f"{what} must be finite, got {value}")
    return value


def check_rows(value: int | None, what: str) -> int | None:
    """`value` where it is None or a whole number of rows, at least 1."""
    check_whole(1, **{what: value})
    return None if value is None else int(value)


def join(parts: Sequence[Batch]) -> Batch:
    """Rows below one another; a part that lacks a column has zeros in it. What is a mapping stays as it is."""
    names = dict.fromkeys(name for part in parts for name in part)
    rows: Batch = {}
    for name in names:
        like = next(part[name] for part in parts if name in part)
        if isinstance(like, dict):
            rows[name] = like
            continue
        rows[name] = np.concatenate(
            [part[name] if name in part else np.zeros((len(part["y"]), *like.shape[1:]), like.dtype) for part in parts]
        )
    return rows

"""A learner is a value: pure functions over flat parameters, bound to a problem by the shell in `base.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import ConfigurationError, ModelError
from ..nn.functional import Parameters, functional, trainable
from ..nn.head import features_of, find_head
from ..nn.losses import LossFn, accuracy, default_loss, has_accuracy
from ..tasks.episode import Episode, EpisodeStack
from .inner_loop import stacking

Meta = dict[str, Parameters]  # {"model": θ, "rule": everything else that is meta-learned}
Metrics = dict[str, mx.array]
MetaGrad = Callable[..., tuple[Metrics, Meta]]


class Problem(NamedTuple):
    """A model and a loss as pure functions; all a learner ever sees of either."""

    apply: Callable[..., mx.array]  # (params, x, *, key=None) -> predictions
    features: Callable[..., mx.array]  # (params, x, *, key=None) -> what goes into the head
    head: Callable[..., mx.array]  # (params, features) -> predictions
    head_paths: tuple[str, ...]  # the head's parameters; () where the model has no head
    loss: Callable[..., mx.array]  # (params, x, y, *, key=None) -> scalar
    criterion: LossFn  # (predictions, targets) -> scalar


def bind(model: nn.Module, loss_fn: LossFn | None = None, head: str | None = None) -> Problem:
    """The problem of `model` under `loss_fn` (default: by the dtype of the targets)."""
    if not (loss_fn is None or callable(loss_fn)):
        raise ConfigurationError(
            f"loss_fn must be a function of (predictions, targets), got {loss_fn!r}; give what follows it by name"
        )
    apply = functional(model)

    def criterion(predictions, targets):
        # A loss may be a module, which without parameters is an empty mapping, and counts as false.
        value = (default_loss(targets) if loss_fn is None else loss_fn)(predictions, targets)
        if not isinstance(value, mx.array) or value.ndim:
            found = f"an array of shape {value.shape}" if isinstance(value, mx.array) else f"{value!r}"
            raise ConfigurationError(f"loss_fn returned {found}; expected one number, such as the mean over the rows")
        return value

    def loss(params, x, y, *, key=None):
        return criterion(apply(params, x, key=key), y)

    try:
        path = find_head(model, head)
    except ModelError as error:
        if head is not None:
            raise
        reason = str(error)

        def headless(*_: Any, **__: Any):
            raise ModelError(reason)

        return Problem(apply, headless, headless, (), loss, criterion)

    def head_of(params, features):
        own = {name[len(path) + 1 :]: value for name, value in params.items() if name.startswith(path + ".")}
        module = model
        for part in path.split("."):
            module = module[int(part)] if isinstance(module, list) else module[part]
        return functional(module)(own, features)

    head_paths = tuple(name for name in trainable(model) if name.startswith(path + "."))
    return Problem(apply, features_of(model, path), head_of, head_paths, loss, criterion)


def as_meta(params: Parameters, *, key: mx.array) -> Meta:
    """`init` of a learner that meta-learns the weights alone."""
    return {"model": params, "rule": {}}


def apply_fast(problem: Problem, fast: Parameters, x: mx.array, *, key: mx.array | None = None) -> mx.array:
    """`predict` of a learner whose fast state is weights."""
    return problem.apply(fast, x, key=key)


def map_tasks(function: Callable, shared: Any, stack: EpisodeStack, keys: mx.array, *more: mx.array) -> Any:
    """`function(shared, support_x, support_y, query_x, query_y, key, *more)` for each task of the stack, stacked.

    A stack of one is called as it is, so that models with operations that have no `vmap` rule can be looped over.
    """
    if stack.num_tasks > 1:
        own = (*stack, keys, *more)
        with stacking():
            return mx.vmap(function, in_axes=(None, *(0 for _ in own)))(shared, *own)
    result = function(shared, *(part[0] for part in (*stack, keys, *more)))
    return tree_map(lambda array: array[None], result)


def query_metrics(
    learner: Learner, problem: Problem, fast: Any, episode: Episode, key: mx.array | None = None
) -> tuple[mx.array, Metrics]:
    """The query loss, to be differentiated, and what there is to report of one task (not differentiated)."""
    sx, sy, qx, qy = episode
    predictions = learner.predict(problem, fast, qx, key=key)
    loss = problem.criterion(predictions, qy)
    frozen = tree_map(mx.stop_gradient, fast)
    metrics = {
        "query_loss": loss,
        "support_loss": problem.criterion(learner.predict(problem, frozen, sx), sy),
    }
    if has_accuracy(predictions, qy):
        metrics["query_accuracy"] = accuracy(predictions, qy)
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def through_adaptation(
    learner: Learner,
    problem: Problem,
    meta: Meta,
    stack: EpisodeStack,
    *,
    keys: mx.array,
    num_steps: int,
    iteration: mx.array,
) -> tuple[Metrics, Meta]:
    """Default meta-gradient: of the mean query loss, through `adapt`."""

    def task(meta, sx, sy, qx, qy, key):
        inner, outer = mx.random.split(key)
        fast = learner.adapt(problem, meta, sx, sy, key=inner, num_steps=num_steps)
        return query_metrics(learner, problem, fast, Episode(sx, sy, qx, qy), outer)

    return mean_gradient(task, meta, stack, keys)


def mean_gradient(task: Callable, meta: Meta, stack: EpisodeStack, keys: mx.array) -> tuple[Metrics, Meta]:
    """Each task's metrics and the gradient of the tasks' mean loss, for `task` as in `map_tasks` -> (loss, metrics)."""

    def outer_loss(meta):
        losses, metrics = map_tasks(task, meta, stack, keys)
        return mx.mean(losses), metrics

    (_, metrics), grads = mx.value_and_grad(outer_loss)(meta)
    return metrics, grads


class Learner(NamedTuple):
    """Pure functions, of which `meta_grad` may change on the way.

    init: (params, *, key) -> meta.
    adapt: (problem, meta, support_x, support_y, *, key, num_steps, each=None) -> fast: fast weights, or prototypes.
        `each(k, fast)`, where given, is called after every number of steps k = 0 … num_steps.
    predict: (problem, fast, x, *, key=None) -> predictions.
    meta_grad: (learner, problem, meta, stack, *, keys, num_steps, iteration) -> (metrics of each task, mean gradient)
        over a stack of tasks with one key each; `iteration` is a traced scalar, for annealing.
    phase: (iteration) -> its `meta_grad`, one object for all iterations of a phase, where training goes through phases
        whose graphs differ; `meta_grad` is then the one that takes most memory.
    loss_fn: of (predictions, targets), where the user gives none, in training and evaluation; default: by the targets.
    """

    adapt: Callable[..., Any]
    init: Callable[..., Meta] = as_meta
    predict: Callable[..., mx.array] = apply_fast
    meta_grad: MetaGrad = through_adaptation
    phase: Callable[[int], MetaGrad] | None = None
    loss_fn: LossFn | None = None

    def meta_grad_at(self, iteration: int) -> MetaGrad:
        """The `meta_grad` of an iteration, counted from 0."""
        return self.meta_grad if self.phase is None else self.phase(iteration)

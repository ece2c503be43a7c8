"""The one inner loop: adaptation as a pure function of weights, rule, support set and key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..nn.functional import Parameters
from .update_rules import RuleParameters, UpdateRule

# Steps of second order whose intermediate results are kept for the way back: the last ones. Those of the steps before
# are computed again, when nothing is left of the last.
KEPT = 5

_stacked = ContextVar("stacked", default=False)


@contextmanager
def stacking() -> Iterator[None]:
    """Within it all steps are kept: `mx.checkpoint` under `mx.vmap` has no effect, or does not compile (MLX 0.32)."""
    token = _stacked.set(True)
    try:
        yield
    finally:
        _stacked.reset(token)


def inner_loop(
    loss: Callable[..., mx.array],
    params: Parameters,
    support_x: mx.array,
    support_y: mx.array,
    *,
    rule: UpdateRule,
    rule_params: RuleParameters,
    num_steps: int,
    adapts: Iterable[str] | None = None,
    second_order: bool = True,
    checkpoint: int | bool | None = None,
    batch_size: int | None = None,
    key: mx.array | None = None,
    each: Callable[[int, Parameters], None] | None = None,
) -> Parameters:
    """`num_steps` steps of `rule` on the support loss, from `params`.

    Args:
        loss: (params, x, y, *, key=None) -> scalar.
        params: the start, θ.
        support_x, support_y: (S, …) both.
        rule, rule_params: the update rule and its meta-learned arrays.
        adapts: paths that the steps may change; the others are held at their start. Default: all.
        second_order: differentiate through the inner gradients; otherwise they count as constants.
        checkpoint: of so many steps, the first ones, the intermediate results are computed again on the way back
            rather than kept: the same numbers, in less memory; True of all. Default: of second order, all but the last
            5, so that memory does not grow with the steps. Where tasks are stacked (`stacking`), none.
        batch_size: rows of the support drawn anew for each step (Reptile); default: all of it.
        key: for random layers and minibatches; without it random layers are inactive.
        each: called with (k, weights) after k steps, k = 0 … `num_steps` (for losses over the whole trajectory).

    Returns:
        the fast weights: all of `params`, adapted.
    """
    paths = tuple(params if adapts is None else adapts)
    held = {path: value for path, value in params.items() if path not in set(paths)}
    fast = {path: params[path] for path in paths}
    state = rule.start(fast)
    if _stacked.get():
        checkpoint = 0
    elif checkpoint is None:
        checkpoint = num_steps - KEPT if second_order else 0
    elif checkpoint is True:
        checkpoint = num_steps

    def one_step(step, fast, state, held, rule_params, x, y, key):
        if batch_size is not None and batch_size < x.shape[0]:
            pick, key = mx.random.split(key)
            rows = mx.argsort(mx.random.uniform(shape=(x.shape[0],), key=pick))[:batch_size]
            x, y = mx.take(x, rows, axis=0), mx.take(y, rows, axis=0)
        # With respect to all of them, though only those of `fast` are used (the rest is never computed): an activation
        # of `mlx.nn`, which is a compiled function, cannot be differentiated later where its input is no argument here.
        grads = mx.grad(loss)({**held, **fast}, x, y, key=key)
        if not second_order:
            grads = {path: mx.stop_gradient(grads[path]) for path in fast}
        return rule.update(rule_params, state, grads, fast, step)

    if each is not None:
        each(0, {**held, **fast})
    for step in range(num_steps):
        own = None
        if key is not None:  # a step's own key does not depend on how many there are
            key, own = mx.random.split(key)
        # Everything differentiated is an explicit argument: `mx.checkpoint` takes what a closure captures for constant.
        run = _checkpointed(one_step, step) if step < checkpoint else lambda *args, step=step: one_step(step, *args)
        fast, state = run(fast, state, held, rule_params, support_x, support_y, own)
        if each is not None:
            each(step + 1, {**held, **fast})
    return {path: fast[path] if path in fast else held[path] for path in params}


def by_steps(
    rule: UpdateRule,
    *,
    start: Callable[..., Parameters] | None = None,
    adapts: Callable[[Any], Iterable[str]] | None = None,
    **options: Any,
) -> Callable[..., Parameters]:
    """`adapt` of a learner that takes steps of `rule`, whose arrays are `meta["rule"]`, on the support's loss.

    Args:
        rule: the update rule.
        start: (problem, meta, support_x, support_y) -> the weights before the first step; default: θ.
        adapts: (problem) -> paths that the steps may change; default: all.
        options: `second_order`, `checkpoint` and `batch_size` of `inner_loop`.
    """

    def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
        return inner_loop(
            problem.loss,
            meta["model"] if start is None else start(problem, meta, support_x, support_y),
            support_x,
            support_y,
            rule=rule,
            rule_params=meta["rule"],
            num_steps=num_steps,
            adapts=None if adapts is None else adapts(problem),
            key=key,
            each=each,
            **options,
        )

    return adapt


def _checkpointed(one_step: Callable, step: int) -> Callable:
    def constant(array: mx.array) -> mx.array:
        # `mx.checkpoint` asks for the gradient of every argument; token ids, class indices and keys have none.
        return array if mx.issubdtype(array.dtype, mx.floating) else mx.stop_gradient(array)

    def run(*args):
        if args[-1] is None:  # the key; `mx.checkpoint` takes arrays only
            return mx.checkpoint(lambda *arrays: one_step(step, *tree_map(constant, arrays), None))(*args[:-1])
        return mx.checkpoint(lambda *arrays: one_step(step, *tree_map(constant, arrays)))(*args)

    return run

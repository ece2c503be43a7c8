"""The one inner loop: adaptation as a pure function of weights, rule, support set and key."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx

from ..nn.functional import Parameters
from .update_rules import RuleParameters, UpdateRule

# From this many steps on, second-order adaptation keeps only each step's weights and recomputes the rest backwards.
CHECKPOINT_FROM = 8


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
    checkpoint: bool | None = None,
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
        checkpoint: recompute each step on the way back (memory of one step instead of `num_steps`; same numbers).
            Default: from 8 second-order steps on.
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
    if checkpoint is None:
        checkpoint = second_order and num_steps >= CHECKPOINT_FROM
    keys: list[mx.array | None] = [None] * num_steps if key is None else list(mx.random.split(key, max(num_steps, 1)))

    def one_step(step, fast, state, held, rule_params, x, y, key):
        y = mx.stop_gradient(y)  # `mx.checkpoint` asks for the gradient of every argument, and class indices have none
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
        # Everything differentiated is an explicit argument: `mx.checkpoint` takes what a closure captures for constant.
        run = (lambda *args, step=step: one_step(step, *args)) if not checkpoint else _checkpointed(one_step, step)
        fast, state = run(fast, state, held, rule_params, support_x, support_y, keys[step])
        if each is not None:
            each(step + 1, {**held, **fast})
    return {path: fast[path] if path in fast else held[path] for path in params}


def _checkpointed(one_step: Callable, step: int) -> Callable:
    def run(fast, state, held, rule_params, x, y, key):
        # `mx.checkpoint` takes arrays only: a missing key stays outside.
        if key is None:
            return mx.checkpoint(lambda *args: one_step(step, *args, None))(fast, state, held, rule_params, x, y)
        return mx.checkpoint(lambda *args: one_step(step, *args))(fast, state, held, rule_params, x, y, key)

    return run

"""How an inner step turns a gradient into new weights.

A rule is a triple of pure functions over flat parameters. `init` gives the arrays that the rule *meta-learns*
(rates, curvature, …; often none), `start` the state of one adaptation (momentum, moments; often none) and `update`
one step. What is meta-learned is differentiated through like the weights themselves. Weights keep their dtype, whatever
the rule's arrays have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from ..nn.elementwise import add_scaled, scaling
from ..nn.functional import Parameters
from ..precision import widened

RuleParameters = dict[str, mx.array]


def _nothing(*_: Any, **__: Any) -> dict:
    return {}


class UpdateRule(NamedTuple):
    update: Callable[..., tuple[Parameters, Any]]  # (rule, state, grads, params, step) -> (params, state)
    init: Callable[..., RuleParameters] = _nothing  # (params, *, key) -> rule
    start: Callable[..., Any] = _nothing  # (params) -> state


def sgd(learning_rate: float) -> UpdateRule:
    """θ ← θ − α ∇L, one fixed rate."""

    scaled = scaling(learning_rate)

    def update(rule, state, grads, params, step):
        return {path: p - scaled(grads[path]) for path, p in params.items()}, state

    return UpdateRule(update)


def momentum(learning_rate: float, beta: float = 0.9) -> UpdateRule:
    """v ← β v + ∇L; θ ← θ − α v (heavy ball)."""

    def start(params):
        return {path: mx.zeros_like(p) for path, p in params.items()}

    def update(rule, state, grads, params, step):
        state = {path: beta * v + grads[path] for path, v in state.items()}
        return {path: p - learning_rate * state[path] for path, p in params.items()}, state

    return UpdateRule(update, start=start)


def adam(learning_rate: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> UpdateRule:
    """Adam (Kingma & Ba 2015) with bias correction, its moments started afresh for every adaptation.

    `beta1=0` is the inner optimiser of Reptile's published runs. The square root is taken of v + eps², so that the
    second-order gradient exists where a weight's gradient is zero.
    """

    def start(params):
        zeros = {path: mx.zeros_like(widened(p)) for path, p in params.items()}
        return (zeros, zeros) if beta1 else ({}, zeros)

    def update(rule, state, grads, params, step):
        first, second = state
        grads = {path: widened(grads[path]) for path in params}
        first = {path: beta1 * m + (1 - beta1) * grads[path] for path, m in first.items()}
        second = {path: beta2 * v + (1 - beta2) * mx.square(grads[path]) for path, v in second.items()}
        mean = first or grads
        scale1, scale2 = 1 / (1 - beta1 ** (step + 1)), 1 / (1 - beta2 ** (step + 1))
        params = {
            path: (p - learning_rate * scale1 * mean[path] / mx.sqrt(scale2 * second[path] + eps**2)).astype(p.dtype)
            for path, p in params.items()
        }
        return params, (first, second)

    return UpdateRule(update, start=start)


def lslr(num_steps: int, learning_rate: float) -> UpdateRule:
    """θ ← θ − α[layer, step] ∇L: a learned rate for each parameter array and step (Antoniou et al. 2019).

    All start at `learning_rate`; steps beyond `num_steps` repeat the last rates. Arrays: `rate.PATH` (`num_steps`,).
    """

    def init(params, *, key):
        return {f"rate.{path}": mx.full((max(num_steps, 1),), learning_rate) for path in params}

    def update(rule, state, grads, params, step):
        # Taken apart once: a gradient for every number that is taken out of an array costs more than the step.
        backwards = state or {path: _numbers(-rule[f"rate.{path}"]) for path in params}
        k = min(step, max(num_steps, 1) - 1)
        return {path: add_scaled(p, backwards[path][k], grads[path]) for path, p in params.items()}, backwards

    return UpdateRule(update, init)


def _numbers(a: mx.array) -> list[mx.array]:
    """(N,) → N numbers ()"""
    return [part.reshape(()) for part in mx.split(a, a.shape[0])]


def clip_scale(grads: Parameters, largest: float) -> mx.array:
    """What to multiply gradients with so that their norm over all arrays is at most `largest`."""
    square = sum((mx.sum(mx.square(widened(g))) for g in grads.values()), mx.array(0.0))
    return mx.minimum(1.0, largest * mx.rsqrt(square + 1e-12))


UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {"sgd": sgd, "momentum": momentum, "adam": adam}

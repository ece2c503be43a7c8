"""Synaptic intelligence."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map

from ..nn.functional import Parameters
from .strategy import Lesson, State, Strategy, check


class SynapticIntelligence(Strategy):
    """c Σ_i Ω_i (θ_i − θ*_i)², Ω_i = Σ_k max(0, ω_ki) / (Δ_ki² + ξ), ω_ki = −Σ_steps g_i δθ_i.

    ω is each weight's share in the fall of the loss along the path of context k, Δ how far it moved.

    Args:
        si_c: strength c.
        xi: damping ξ.

    Reference: Zenke, Poole & Ganguli (2017), Continual learning through synaptic intelligence, ICML.
    Differs from the paper in: nothing known; g is the gradient of the cross entropy alone, without the penalty's.
        Joined with other strategies it is what the optimiser is given, less this penalty's: theirs are in it.
    """

    name = "si"

    def __init__(self, si_c: float = 1.0, *, xi: float = 0.1):
        self.si_c = check(si_c, "si_c")
        self.xi = check(xi, "xi", strict=True)

    def start(self, params: Parameters) -> State:
        zeros = tree_map(mx.zeros_like, params)
        return {"importance": zeros, "path": zeros, "centre": params}

    def penalty(self, state, params, logits, batch):
        importance, centre = state["importance"], state["centre"]
        terms = [mx.sum(importance[path] * mx.square(p - centre[path])) for path, p in params.items()]
        return self.si_c * sum(terms[1:], terms[0])

    def track(self, state, grads, old, new):
        importance, centre = state["importance"], state["centre"]
        path = {
            p: w - (grads[p] - 2 * self.si_c * importance[p] * (old[p] - centre[p])) * (new[p] - old[p])
            for p, w in state["path"].items()
        }
        return {**state, "path": path}

    def end(self, state: State, lesson: Lesson) -> State:
        centre, params = state["centre"], lesson.params
        importance = {
            p: total + mx.maximum(state["path"][p], 0) / (mx.square(params[p] - centre[p]) + self.xi)
            for p, total in state["importance"].items()
        }
        return {"importance": importance, "path": tree_map(mx.zeros_like, params), "centre": params}

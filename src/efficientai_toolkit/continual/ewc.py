"""Elastic weight consolidation."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import ConfigurationError
from ..nn.functional import Parameters
from .fisher import LABELS, fisher_diagonal
from .strategy import Lesson, State, Strategy, check, check_rows


class ElasticWeights(Strategy):
    """½ λ Σ_k Σ_i F_ki (θ_i − θ*_ki)² over the contexts k learned so far.

    The sum over contexts is one parabola, kept as its precision P = Σ F_k and centre μ = Σ F_k θ*_k / Σ F_k, so
    memory does not grow with the contexts. The online variant (Schwarz et al. 2018) keeps P ← γ P + F and moves the
    centre to the latest weights.

    Args:
        ewc_lambda: λ.
        online: one running penalty instead of one a context.
        gamma: decay of the running precision (online).
        fisher_scale: multiplies F.
        fisher_samples: rows of a context on which F is taken; default all.
        fisher_labels: see `fisher_diagonal`.

    Reference: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, PNAS.
    Differs from the paper in: nothing but the constant of the parabola, which has no gradient.
    """

    name = "ewc"

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        *,
        online: bool = False,
        gamma: float = 1.0,
        fisher_scale: float = 1.0,
        fisher_samples: int | None = None,
        fisher_labels: str = "all",
    ):
        self.ewc_lambda = check(ewc_lambda, "ewc_lambda")
        self.fisher_scale = check(fisher_scale, "fisher_scale")
        if not 0 <= gamma <= 1:
            raise ConfigurationError(f"gamma must be in [0, 1], got {gamma}")
        if fisher_labels not in LABELS:
            raise ConfigurationError(f"fisher_labels={fisher_labels!r}: use one of {', '.join(LABELS)}")
        self.online, self.gamma = online, gamma
        self.fisher_samples, self.fisher_labels = check_rows(fisher_samples, "fisher_samples"), fisher_labels
        self._model: nn.Module | None = None

    def bind(self, model: nn.Module) -> None:
        """The module itself: its layers decide how F is computed."""
        self._model = model

    def start(self, params: Parameters) -> State:
        return {"precision": tree_map(mx.zeros_like, params), "centre": params}

    def penalty(self, state, params, logits, batch):
        precision, centre = state["precision"], state["centre"]
        terms = [mx.sum(precision[path] * mx.square(p - centre[path])) for path, p in params.items()]
        return self.ewc_lambda / 2 * sum(terms[1:], terms[0])

    def end(self, state: State, lesson: Lesson) -> State:
        return self.consolidate(state, lesson.params, self.fisher(lesson))

    def fisher(self, lesson: Lesson) -> Parameters:
        """F at the lesson's weights over its rows."""
        if self._model is None:
            raise ConfigurationError("bind(model) before the Fisher information is taken")
        rows = slice(None)
        if self.fisher_samples is not None and self.fisher_samples < len(lesson.y):
            rows = lesson.rng.permutation(len(lesson.y))[: self.fisher_samples]
        table = lesson.active
        at = mx.minimum(mx.array(lesson.contexts[rows]), table.shape[0] - 1)
        fisher = fisher_diagonal(
            self._model,
            lesson.params,
            lesson.x[rows],
            lesson.y[rows],
            None if table.size == 1 else mx.take(table, at, axis=0),
            labels=self.fisher_labels,
            rng=lesson.rng,
        )
        return {path: self.fisher_scale * f for path, f in fisher.items()}

    def consolidate(self, state: State, params: Parameters, fisher: Parameters) -> State:
        """`state` with one more parabola, of precision `fisher` around `params`."""
        old, centre = state["precision"], state["centre"]
        if self.online:
            return {"precision": {p: self.gamma * old[p] + f for p, f in fisher.items()}, "centre": params}
        total = {path: old[path] + f for path, f in fisher.items()}
        # Centre plus a share of the step from it: exact where one side has no precision, and no large products.
        share = {path: fisher[path] / mx.where(t > 0, t, 1.0) for path, t in total.items()}
        moved = {path: c + share[path] * (params[path] - c) for path, c in centre.items()}
        return {"precision": total, "centre": moved}


class OnlineElasticWeights(ElasticWeights):
    """`ElasticWeights` with one running penalty."""

    name = "online-ewc"

    def __init__(self, ewc_lambda: float = 1.0, *, gamma: float = 1.0, **options):
        super().__init__(ewc_lambda, online=True, gamma=gamma, **options)

"""What `MetaLearner.adapt` returns: a copy of the model with a learner's fast state in it."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..nn.functional import clone, update
from ..nn.losses import LossFn
from ..nn.statistics import keep, recorded
from .learner import Learner, apply_fast, bind


class Predictor(nn.Module):
    """What `adapt` gives, for type checkers: a module that is called with inputs and answers with predictions."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError


class AdaptedModel(Predictor):
    """A model together with a learner's fast state that is not weights (prototypes, a closed-form head, …)."""

    def __init__(self, model: nn.Module, learner: Learner, fast: Any, loss_fn: LossFn | None, head: str | None):
        super().__init__()
        self.model = model
        self._learner, self._fast = learner, fast
        self._problem = bind(model, loss_fn, head)

    def __call__(self, x: mx.array) -> mx.array:
        return self._learner.predict(self._problem, self._fast, x)


def adapted_copy(
    model: nn.Module, learner: Learner, fast: Any, support_x: mx.array, loss_fn: LossFn | None, head: str | None
) -> Predictor:
    """A copy of `model` with `fast`, which normalises by the statistics of `support_x` (S, *input) from now on."""
    copied = clone(model)
    adapted = cast(Predictor, copied)
    if learner.predict is apply_fast:
        update(adapted, fast)
    else:
        adapted = AdaptedModel(copied, learner, fast, loss_fn, head)
    with recorded() as statistics:
        adapted(support_x)  # computed only where something normalises by it
    mx.eval(statistics)
    keep(copied, statistics)
    return adapted

"""Meta-SGD (Li, Zhou, Chen & Li 2017): the inner rates are learned, one for each weight."""

from __future__ import annotations

import mlx.core as mx

from ..errors import ConfigurationError
from .base import MetaLearner
from .learner import Learner
from .maml import maml
from .update_rules import UpdateRule


def meta_sgd_rule(low: float, high: float) -> UpdateRule:
    """θ ← θ − α ∘ ∇L, α of θ's shape, drawn uniformly from (`low`, `high`). Arrays: `rate.PATH`."""

    def init(params, *, key):
        keys = mx.random.split(key, len(params))
        return {
            f"rate.{path}": mx.random.uniform(low, high, p.shape, key=k)
            for (path, p), k in zip(params.items(), keys, strict=True)
        }

    def update(rule, state, grads, params, step):
        return {path: (p - rule[f"rate.{path}"] * grads[path]).astype(p.dtype) for path, p in params.items()}, state

    return UpdateRule(update, init)


class MetaSGDLearner(MetaLearner):
    """Meta-SGD: (θ, α) ← (θ, α) − β ∇_(θ, α) Σ_tasks L_query(θ − α ∘ ∇L_support(θ)).

    The rates start positive and may become negative, as in the paper. They are tuned to the trained number of steps:
    one step's rates are far too large for five, so evaluate with the number that was trained.

    Options:
        rate_range: the rates are drawn uniformly from it; `inner_lr` is not used.
        first_order: count the inner gradients as constants.

    Reference: Z. Li, F. Zhou, F. Chen, H. Li, *Meta-SGD: Learning to Learn Quickly for Few-Shot Learning*,
    arXiv:1707.09835. Differs from the paper in: any number of inner steps (one there).
    """

    algorithm = "meta_sgd"

    def build(self, *, rate_range: tuple[float, float] = (0.005, 0.1), first_order: bool = False) -> Learner:
        low, high = rate_range
        if not 0 <= low <= high:
            raise ConfigurationError(f"MetaSGDLearner: rate_range must be a pair 0 ≤ low ≤ high, got {rate_range}")
        return maml(meta_sgd_rule(low, high), second_order=not first_order)

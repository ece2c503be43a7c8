"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017), second order."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..errors import ConfigurationError
from ..settings import Steps
from .base import MetaLearner
from .inner_loop import by_steps
from .learner import Learner
from .update_rules import UpdateRule, sgd


def maml(
    rule: UpdateRule,
    *,
    second_order: bool = True,
    checkpoint: int | bool | None = None,
) -> Learner:
    """θ′ = θ − α ∇L_support(θ), repeated; ∇_θ L_query(θ′) through all of it.

    Args:
        rule: the update rule; α is its rate.
        second_order: differentiate through the inner gradients.
        checkpoint: see `inner_loop`.
    """

    def init(params, *, key):
        return {"model": params, "rule": rule.init(params, key=key)}

    return Learner(by_steps(rule, second_order=second_order, checkpoint=checkpoint), init)


class MAMLLearner(MetaLearner):
    """Second-order MAML.

    θ ← θ − β ∇_θ Σ_tasks L_query(θ − α ∇L_support(θ)), with Adam as the outer optimiser.

    Options:
        first_order: count the inner gradients as constants (FOMAML).
        checkpoint: recompute so many inner steps, the first ones, on the way back (True: all), in place of keeping
            their intermediate results; by default all but the last 5, so that memory does not grow with their number.

    Example:
        >>> learner = MAMLLearner(SimpleClassifier(), inner_lr=0.1)
        >>> learner.meta_train(tasks, num_iterations=500)
        >>> adapted = learner.adapt(support_x, support_y)

    Reference: C. Finn, P. Abbeel, S. Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*,
    ICML 2017, arXiv:1703.03400. Differs from the paper in nothing but the weights' initialisation.
    """

    algorithm = "maml"

    def build(self, *, first_order: bool = False, checkpoint: Steps | bool | None = None) -> Learner:
        return maml(sgd(self.inner_lr), second_order=not first_order, checkpoint=checkpoint)


class MAML(MAMLLearner):
    """`MAMLLearner` with the argument names of other frameworks: `MAML(model, lr_inner=0.01, lr_outer=0.001)`."""

    def __init__(
        self,
        model: nn.Module,
        lr_inner: float = 0.01,
        lr_outer: float = 0.001,
        num_inner_steps: int = 5,
        **options: Any,
    ):
        for name in sorted({"inner_lr", "outer_lr"} & options.keys()):
            meant = "_".join(reversed(name.split("_")))
            raise ConfigurationError(f"MAML has no option {name!r}; did you mean {meant!r}? MAMLLearner has {name}")
        super().__init__(model, lr_inner, lr_outer, num_inner_steps, **options)

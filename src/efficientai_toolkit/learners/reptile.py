"""Reptile (Nichol, Achiam & Schulman 2018)."""

from __future__ import annotations

import mlx.core as mx

from ..errors import ConfigurationError, did_you_mean
from ..settings import Count
from ..tasks.episode import Episode
from .base import MetaLearner
from .inner_loop import by_steps
from .learner import Learner, map_tasks, query_metrics
from .update_rules import UPDATE_RULES, UpdateRule


def reptile(rule: UpdateRule, *, batch_size: int | None = None, use_query: bool = False) -> Learner:
    """The meta-gradient is the displacement θ − mean θ′; nothing is differentiated but the inner loss.

    Args:
        rule: the inner optimiser.
        batch_size: rows drawn for each inner step; default: all.
        use_query: adapt on support and query together while meta-training, as the paper's few-shot runs do.
    """

    adapt = by_steps(rule, second_order=False, batch_size=batch_size)

    def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
        def task(meta, sx, sy, qx, qy, key):
            x, y = (mx.concatenate([sx, qx]), mx.concatenate([sy, qy])) if use_query else (sx, sy)
            fast = adapt(problem, meta, x, y, key=key, num_steps=num_steps)
            return fast, query_metrics(learner, problem, fast, Episode(sx, sy, qx, qy))[1]

        fast, metrics = map_tasks(task, meta, stack, keys)
        grads = {path: meta["model"][path] - mx.mean(value, axis=0) for path, value in fast.items()}
        return metrics, {"model": grads, "rule": {}}

    return Learner(adapt, meta_grad=meta_grad)


class ReptileLearner(MetaLearner):
    """Reptile: θ ← θ − β (θ − mean θ′), where θ′ is θ after `num_inner_steps` steps on a task.

    With the default outer optimiser, Adam, the displacement is used as a gradient, as the paper suggests; with
    `outer_optimizer="sgd"` the update is the paper's literal rule, with β the outer rate (0.1 to 1 there).

    Options:
        inner_optimizer: "sgd" (default), "momentum", or "adam" (with β₁ = 0, as in the published runs).
        inner_batch_size: rows of the support drawn anew for each inner step; default: all of them.
        use_query: adapt on support and query together while meta-training (the paper's "train shots").

    Reference: A. Nichol, J. Achiam, J. Schulman, *On First-Order Meta-Learning Algorithms*, arXiv:1803.02999.
    Differs from the paper in: inner minibatches are drawn independently, not without replacement over an epoch. Differs
    from its published runs in: the moments of the inner Adam start afresh for every task, where those go on.
    """

    algorithm = "reptile"

    def build(
        self, *, inner_optimizer: str = "sgd", inner_batch_size: Count | None = None, use_query: bool = False
    ) -> Learner:
        if inner_optimizer not in UPDATE_RULES:
            raise ConfigurationError(
                f"unknown inner_optimizer {inner_optimizer!r}{did_you_mean(inner_optimizer, UPDATE_RULES)}"
            )
        options = {"beta1": 0.0} if inner_optimizer == "adam" else {}
        rule = UPDATE_RULES[inner_optimizer](self.inner_lr, **options)
        return reptile(rule, batch_size=inner_batch_size, use_query=use_query)

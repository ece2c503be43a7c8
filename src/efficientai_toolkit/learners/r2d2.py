"""R2-D2 (Bertinetto, Henriques, Torr & Vedaldi 2019): a ridge-regression head, solved in closed form."""

from __future__ import annotations

import mlx.core as mx

from ..nn.losses import is_classification
from ..settings import Positive
from .base import MetaLearner
from .labels import classes
from .learner import Learner
from .metric import one_hot, present, rule_out


def solve_spd(a: mx.array, b: mx.array) -> mx.array:
    """X of A X = B for symmetric positive definite `a` (n, n) and `b` (n, m), differentiable to every order.

    Gauss-Jordan elimination, which needs no pivoting for such matrices; unrolled, since MLX's factorisations have
    no gradient. Meant for n up to a hundred or so.
    """
    n = a.shape[-1]
    rows = mx.concatenate([a, b], axis=-1)
    own = mx.eye(n)  # its columns, since a number j would be a constant of a kernel, compiled for every row
    for j in range(n):
        pivot = rows[j : j + 1] / rows[j : j + 1, j : j + 1]
        rows = mx.where(own[:, j : j + 1] > 0, pivot, rows - rows[:, j : j + 1] * pivot)
    return rows[:, n:]


# float32's rounding, relative to the trace, which is at least the largest eigenvalue: below it a pivot may be negative.
FLOOR = 2.0**-23


def regularized(gram: mx.array, strength: mx.array) -> mx.array:
    """K + max(λ, 2⁻²³ tr K) I for `gram` K (n, n), positive definite in float32 where K alone is not, or not with λ.

    So duplicates among few examples, or very large inputs, give finite numbers. Where λ is larger, it is left alone.
    """
    identity = mx.eye(gram.shape[0])
    trace = mx.sum(gram * identity)  # whose gradient, unlike that of a diagonal taken out, is no scatter
    return gram + mx.maximum(strength, FLOOR * trace) * identity


def ridge(features: mx.array, targets: mx.array, strength: mx.array) -> mx.array:
    """argmin_W ‖X W − Y‖² + λ ‖W‖² for `features` X (S, D), `targets` Y (S, O): (D, O).

    By Woodbury's identity the system is of the smaller of S and D: W = Xᵀ (X Xᵀ + λ I)⁻¹ Y. On GPUs whose products
    are rounded to TF32, predictions move by about 1e-3 of the largest; `MLX_ENABLE_TF32=0` asks for float32.
    """
    size, width = features.shape
    if size <= width:
        return features.T @ solve_spd(regularized(features @ features.T, strength), targets)
    return solve_spd(regularized(features.T @ features, strength), features.T @ targets)


def with_one(features: mx.array) -> mx.array:
    """(N, D) → (N, D + 1), so that the head has a bias."""
    return mx.concatenate([features, mx.ones((features.shape[0], 1))], axis=-1)


class R2D2Learner(MetaLearner):
    """The head is the ridge regression of the support's targets (one-hot classes) on its features; all else is
    meta-learned through its solution.

    Logits are a · (φ(x) W) + b; λ, a and b are learned. There are no inner steps: `num_inner_steps` and `inner_lr` are
    not used. For regression the predictions are φ(x) W alone; see `ALPaCALearner` for its Bayesian form.

    Options:
        strength: λ at the start.

    Reference: L. Bertinetto, J. Henriques, P. Torr, A. Vedaldi, *Meta-learning with Differentiable Closed-form
    Solvers*, ICLR 2019, arXiv:1805.08136. Differs from the paper in: the ridge penalty covers the bias too; classes
    that the support lacks are ruled out.
    """

    algorithm = "r2d2"
    adapts_by_steps = False
    has_slots = True

    def build(self, *, strength: Positive = 1.0) -> Learner:
        def init(params, *, key):
            rule = {"log_strength": mx.log(mx.array(strength)), "scale": mx.array(10.0), "shift": mx.array(0.0)}
            return {"model": params, "rule": rule}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            model, rule = meta["model"], meta["rule"]
            features = with_one(problem.features(model, support_x, key=key))
            if not is_classification(support_y):
                targets = support_y.reshape(support_y.shape[0], -1)
                return {"model": model, "head": ridge(features, targets, mx.exp(rule["log_strength"]))}
            targets = one_hot(support_y, classes(problem, model, support_y))
            head = ridge(features, targets, mx.exp(rule["log_strength"]))
            return {"model": model, "head": rule["scale"] * head, "shift": rule["shift"], "having": present(targets)}

        def predict(problem, fast, x, *, key=None):
            predictions = with_one(problem.features(fast["model"], x, key=key)) @ fast["head"]
            return rule_out(predictions + fast["shift"], fast["having"]) if "having" in fast else predictions

        return Learner(adapt, init, predict)

"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine 2019)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..config import Count
from ..errors import ConfigurationError
from ..nn.functional import Parameters
from ..tasks.episode import Episode
from .base import MetaLearner
from .inner_loop import inner_loop
from .learner import Learner, map_tasks, query_metrics
from .update_rules import UpdateRule


def proximal_sgd(learning_rate: float, strength: float) -> UpdateRule:
    """φ ← argmin_ψ ⟨∇L(φ), ψ⟩ + ‖ψ − φ‖² / 2α + λ/2 ‖ψ − θ‖² = (φ − α ∇L(φ) + α λ θ) / (1 + α λ), from φ = θ.

    Its fixed points are those of gradient descent on L(φ) + λ/2 ‖φ − θ‖², and it is stable for every λ.
    """
    share = 1 / (1 + learning_rate * strength)

    def start(params):
        return params

    def update(rule, theta, grads, params, step):
        return {
            path: share * (p - learning_rate * grads[path]) + (1 - share) * theta[path] for path, p in params.items()
        }, theta

    return UpdateRule(update, start=start)


def conjugate_gradient(matvec: Callable[[Parameters], Parameters], b: Parameters, steps: int) -> Parameters:
    """x after `steps` steps of conjugate gradient on A x = b, from zero.

    It stays where it is once the residual is zero, or along a direction of negative curvature (where A is not
    positive definite and the method has no meaning).
    """

    def dot(u, v):
        return sum((mx.sum(u[path] * v[path]) for path in u), mx.array(0.0))

    def ratio(a, c):
        return mx.where(c > 0, a / mx.where(c > 0, c, 1), 0)

    x = {path: mx.zeros_like(value) for path, value in b.items()}
    residual, direction, square = b, b, dot(b, b)
    for _ in range(steps):
        image = matvec(direction)
        length = ratio(square, dot(direction, image))
        x = {path: x[path] + length * direction[path] for path in x}
        residual = {path: residual[path] - length * image[path] for path in x}
        new = dot(residual, residual)
        going_on = (length > 0) * ratio(new, square)
        direction = {path: (length > 0) * residual[path] + going_on * direction[path] for path in x}
        square = new
    return x


class IMAMLLearner(MetaLearner):
    """iMAML: φ* minimises L_support(φ) + λ/2 ‖φ − θ‖²; the meta-gradient is (I + ∇²L_support(φ*) / λ)⁻¹ ∇L_query(φ*).

    The inverse is applied by conjugate gradient on Hessian-vector products at φ* alone, so the path there is never
    differentiated, and memory does not grow with the inner steps. The gradient is right where the inner problem
    is nearly solved: many inner steps.

    Options:
        strength: λ. Larger keeps φ nearer θ.
        cg_steps: steps of conjugate gradient.

    Reference: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, *Meta-Learning with Implicit Gradients*, NeurIPS 2019,
    arXiv:1909.04630. Differs from the paper in: the pull to θ is taken as a proximal step, so no λ is too stiff.
    """

    algorithm = "imaml"

    def build(self, *, strength: float = 2.0, cg_steps: Count = 5) -> Learner:
        if strength <= 0:
            raise ConfigurationError(f"strength must be positive, got {strength}")
        rule = proximal_sgd(self.inner_lr, strength)

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            return inner_loop(
                problem.loss,
                meta["model"],
                support_x,
                support_y,
                rule=rule,
                rule_params={},
                num_steps=num_steps,
                second_order=False,
                key=key,
                each=each,
            )

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            def task(meta, sx, sy, qx, qy, key):
                inner, outer = mx.random.split(key)
                fast = adapt(problem, meta, sx, sy, key=inner, num_steps=num_steps)

                def query(fast):
                    return query_metrics(learner, problem, fast, Episode(sx, sy, qx, qy), outer)

                (_, metrics), direct = mx.value_and_grad(query)(fast)

                def slope(fast, v):
                    grads = mx.grad(problem.loss)(fast, sx, sy)
                    return sum(mx.sum(grads[path] * v[path]) for path in v)

                def matvec(v):
                    curved = mx.grad(slope)(fast, v)
                    return {path: v[path] + curved[path] / strength for path in v}

                return conjugate_gradient(matvec, direct, cg_steps), metrics

            grads, metrics = map_tasks(task, meta, stack, keys)
            return metrics, {"model": {path: mx.mean(g, axis=0) for path, g in grads.items()}, "rule": {}}

        return Learner(adapt, meta_grad=meta_grad)

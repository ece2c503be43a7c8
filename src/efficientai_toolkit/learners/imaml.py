"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine 2019)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..nn.elementwise import cut, scaling
from ..nn.trees import ravel
from ..settings import Count, Positive
from ..tasks.episode import Episode
from .base import MetaLearner
from .inner_loop import by_steps
from .learner import Learner, map_tasks, query_metrics
from .update_rules import UpdateRule, clip_scale


def proximal_sgd(learning_rate: float, strength: float, largest: float | None = None) -> UpdateRule:
    """φ ← argmin_ψ ⟨∇L(φ), ψ⟩ + ‖ψ − φ‖² / 2α + λ/2 ‖ψ − θ‖² = (φ − α ∇L(φ) + α λ θ) / (1 + α λ), from φ = θ.

    Its fixed points are those of gradient descent on L(φ) + λ/2 ‖φ − θ‖², and it is stable for every λ. The norm of the
    gradient of L is at most `largest`, where that is given.
    """
    share = 1 / (1 + learning_rate * strength)
    kept, moved, pulled = scaling(share), scaling(share * learning_rate), scaling(1 - share)

    def start(params):
        return {path: pulled(p) for path, p in params.items()}

    def update(rule, pull, grads, params, step):
        if largest is not None:
            scale = clip_scale({path: grads[path] for path in params}, largest)
            grads = {path: (scale * grads[path]).astype(params[path].dtype) for path in params}
        return {path: kept(p) - moved(grads[path]) + pull[path] for path, p in params.items()}, pull

    return UpdateRule(update, start=start)


def conjugate_gradient(matvec: Callable[[mx.array], mx.array], b: mx.array, steps: int) -> mx.array:
    """x (T, P) after `steps` steps of conjugate gradient on T systems A x = b at once, from zero.

    A system stays where it is once its residual is zero, or along a direction of negative or hardly positive curvature,
    under a tenth of the identity's: there iMAML's A = I + ∇²L/λ is far from convex, and a step would be very long.
    """

    def dot(u, v):  # (T, 1, P) twice → (T, 1, 1); as a matrix product a tenth of the time of a sum on a CPU
        return u @ v.swapaxes(1, 2)

    def ratio(a, c):
        # A kernel of its own, or the comparisons would be computed again for each of the P numbers.
        return cut(mx.where(c > 0, a / mx.where(c > 0, c, 1), 0))

    b = b[:, None]
    size = mx.max(mx.abs(b), axis=2, keepdims=True)
    size = cut(mx.where(size > 0, size, 1))  # squares of a task that was thrown far would overflow
    b = b / size
    x, residual, direction, square = mx.zeros_like(b), b, b, dot(b, b)
    for _ in range(steps):
        image = matvec(direction[:, 0])[:, None]
        curvature = dot(direction, image)
        length = ratio(square, mx.where(curvature > 0.1 * dot(direction, direction), curvature, 0))
        x = x + length * direction
        residual = residual - length * image
        new = dot(residual, residual)
        # Along negative curvature the residual stays, and so does a direction of zero from there on.
        going_on = cut((length > 0).astype(residual.dtype))
        direction = going_on * (residual + ratio(new, square) * direction)
        square = new
    return (size * x)[:, 0]


class IMAMLLearner(MetaLearner):
    """iMAML: φ* minimises L_support(φ) + λ/2 ‖φ − θ‖²; the meta-gradient is (I + ∇²L_support(φ*) / λ)⁻¹ ∇L_query(φ*).

    The inverse is applied by conjugate gradient on Hessian-vector products at φ* alone, so the path there is never
    differentiated, and memory does not grow with the inner steps. The gradient is right where the inner problem
    is nearly solved: many inner steps.

    Options:
        strength: λ. Larger keeps φ nearer θ.
        cg_steps: steps of conjugate gradient.
        inner_clip: largest norm of an inner gradient, so that no task's weights are thrown far; None leaves it alone.

    Reference: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, *Meta-Learning with Implicit Gradients*, NeurIPS 2019,
    arXiv:1909.04630. Differs from the paper in: the pull to θ is taken as a proximal step, so no λ is too stiff.
    """

    algorithm = "imaml"

    def build(self, *, strength: Positive = 2.0, cg_steps: Count = 5, inner_clip: Positive | None = None) -> Learner:
        rule = proximal_sgd(self.inner_lr, strength, inner_clip)

        adapt = by_steps(rule, second_order=False)

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            def solve(meta, sx, sy, qx, qy, key):
                inner, outer, _ = mx.random.split(key, 3)
                fast = adapt(problem, meta, sx, sy, key=inner, num_steps=num_steps)
                vector, restore = ravel(fast)

                def query(vector):
                    return query_metrics(learner, problem, restore(vector), Episode(sx, sy, qx, qy), outer)

                (_, metrics), direct = mx.value_and_grad(query)(vector)
                return vector, direct, metrics

            def curved(meta, sx, sy, qx, qy, key, at, v):
                """∇²L_support(φ) v. One key for every product, so that random layers leave one matrix to solve with."""
                _, restore = ravel(meta["model"])
                slope = mx.grad(lambda vector: problem.loss(restore(vector), sx, sy, key=mx.random.split(key, 3)[2]))
                return mx.vjp(slope, [at], [v])[1][0]

            at, direct, metrics = map_tasks(solve, meta, stack, keys)
            # Outside of the stacking, so that what is one number a task stays one.
            solved = conjugate_gradient(
                lambda v: v + map_tasks(curved, meta, stack, keys, at, v) / strength, direct, cg_steps
            )
            _, restore = ravel(meta["model"])
            return metrics, {"model": restore(mx.mean(solved, axis=0)), "rule": {}}

        return Learner(adapt, meta_grad=meta_grad)

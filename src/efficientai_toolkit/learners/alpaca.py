"""ALPaCA (Harrison, Sharma & Pavone 2018): Bayesian linear regression on meta-learned features."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import ModelError, TaskSamplingError
from ..nn.functional import locate
from ..nn.head import find_head
from ..nn.losses import is_classification
from ..settings import Positive
from ..tasks.episode import Episode, EpisodeStack, as_array, as_stacks
from .base import MetaLearner
from .learner import Learner, mean_gradient, query_metrics
from .r2d2 import regularized, solve_spd, with_one


def posterior(
    features: mx.array, targets: mx.array, mean: mx.array, factor: mx.array, noise: mx.array
) -> tuple[mx.array, mx.array]:
    """Posterior of W in y = φ W + ε, from the prior W ~ N(`mean`, L Lᵀ) per output and ε ~ N(0, `noise`).

    Args:
        features, targets, mean, factor: Φ (S, D), Y (S, O), (D, O), and L (D, D).

    Returns:
        the posterior's mean (D, O) and covariance (D, D), the same for every output. The covariance is a difference:
        on GPUs whose products are rounded to TF32, variances below about 1e-3 of the prior's are rounding alone;
        `MLX_ENABLE_TF32=0` asks for float32.
    """
    white = features @ factor  # (S, D)
    solved = solve_spd(regularized(white @ white.T, noise), mx.concatenate([targets - features @ mean, white], axis=-1))
    outputs = targets.shape[-1]
    new_mean = mean + factor @ (white.T @ solved[:, :outputs])
    covariance = mx.eye(factor.shape[0]) - white.T @ solved[:, outputs:]
    return new_mean, factor @ covariance @ factor.T


class ALPaCALearner(MetaLearner):
    """Regression by the posterior of the last layer: W | support, in closed form.

    The prior's mean is the model's own head (held, where that is frozen), its covariance L Lᵀ and the noise σ² are
    learned, and so are the features, through the posterior. There are no inner steps: `num_inner_steps` and `inner_lr`
    are not used. The system of the support is solved in float32, with at least the noise that this needs (`r2d2.FLOOR`
    of its trace): inputs in the hundreds cost digits, so scale them to about one.

    Options:
        noise: σ² at the start.
        likelihood: the outer loss is the negative log-likelihood of the query under the predictive distribution, as
            in the paper; otherwise the loss of the predictive mean alone, and the variance means nothing. (On the
            sinusoids the likelihood ends with the far lower squared error too.)

    Reference: J. Harrison, A. Sharma, M. Pavone, *Meta-Learning Priors for Efficient Online Bayesian Regression*,
    WAFR 2018, arXiv:1807.08912. Differs from the paper in: the noise is learned and the same for all outputs; the
    posterior is computed at once in its dual (Gaussian-process) form, of the support's size.
    """

    algorithm = "alpaca"
    only = "regression"
    adapts_by_steps = False

    def build(self, *, noise: Positive = 0.1, likelihood: bool = True) -> Learner:
        path = find_head(self._model, self._head)
        container, name = locate(self._model, path)
        head = container[name]  # trained or frozen
        weight = head.get("weight")
        if weight is None or weight.ndim != 2 or not mx.issubdtype(weight.dtype, mx.floating):
            raise ModelError(f"the head {path!r} must be an nn.Linear: its weights are the mean of ALPaCA's prior")
        outputs, width = weight.shape

        def init(params, *, key):
            return {"model": params, "rule": {"factor": mx.eye(width + 1), "log_noise": mx.log(mx.array(noise))}}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            if is_classification(support_y):
                raise TaskSamplingError("alpaca is for regression and got classes; use r2d2 for those")
            model, rule = meta["model"], meta["rule"]
            weight = model.get(f"{path}.weight", head.weight)
            bias = model.get(f"{path}.bias", head.get("bias", mx.zeros((outputs,))))
            prior = mx.concatenate([weight, bias[:, None]], axis=1).T
            features = with_one(problem.features(model, support_x, key=key))
            sigma = mx.exp(rule["log_noise"])
            targets = support_y.reshape(support_y.shape[0], -1)
            mean, covariance = posterior(features, targets, prior, rule["factor"], sigma)
            return {"model": model, "mean": mean, "covariance": covariance, "noise": sigma}

        def predict(problem, fast, x, *, key=None):
            return with_one(problem.features(fast["model"], x, key=key)) @ fast["mean"]

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            def task(meta, sx, sy, qx, qy, key):
                inner, outer = mx.random.split(key)
                fast = adapt(problem, meta, sx, sy, key=inner, num_steps=0)
                _, metrics = query_metrics(learner, problem, fast, Episode(sx, sy, qx, qy), outer)
                mean, variance = predictive(problem, fast, qx, key=outer)
                error = mx.square(qy.reshape(mean.shape) - mean)
                return 0.5 * mx.mean(error / variance + mx.log(variance)), metrics

            return mean_gradient(task, meta, stack, keys)

        learner = Learner(adapt, init, predict)
        return learner._replace(meta_grad=meta_grad) if likelihood else learner

    def predict_distribution(self, support_x: Any, support_y: Any, x: Any) -> tuple[mx.array, mx.array]:
        """Mean (N, O) and variance (N, 1) of the targets at `x` (N, *input), given the support (S, *input), (S, O)."""
        support_x, support_y, x = map(as_array, (support_x, support_y, x))
        as_stacks(EpisodeStack(*2 * (support_x[None], support_y[None])))  # or it says what does not fit
        problem = self.problem()
        fast = self.learner.adapt(problem, self.meta, support_x, support_y, key=None, num_steps=0)
        return predictive(problem, fast, x)


def predictive(problem, fast, x: mx.array, *, key: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Mean (N, O) and variance (N, 1), noise included."""
    features = with_one(problem.features(fast["model"], x, key=key))
    spread = mx.sum((features @ fast["covariance"]) * features, axis=-1, keepdims=True)
    return features @ fast["mean"], mx.maximum(spread, 0) + fast["noise"]

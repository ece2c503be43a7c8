"""MAML++ (Antoniou, Edwards & Storkey 2019): six remedies for MAML's training, each with its own switch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..errors import ConfigurationError, ModelError
from ..nn.functional import trainable
from ..nn.layers import EpisodicBatchNorm
from ..optimizers import Rate, schedule
from ..settings import Count, Steps, check_positive
from ..tasks.episode import Episode
from .base import MetaLearner
from .learner import Learner, MetaGrad, mean_gradient, query_metrics
from .maml import maml
from .update_rules import UpdateRule, sgd
from .update_rules import lslr as learned_rates  # `lslr` is an option's name below

NORMS = (EpisodicBatchNorm, nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)


def per_step(rule: UpdateRule, paths: tuple[str, ...], num_steps: int) -> UpdateRule:
    """`rule`, but after each step the arrays at `paths` are set to learned values of that step's own.

    Arrays: `step.PATH` (`num_steps`, *shape), for the weights after 1 … `num_steps` steps.
    """

    def init(params, *, key):
        own = {f"step.{path}": mx.stack([params[path]] * num_steps) for path in paths}
        return rule.init({path: p for path, p in params.items() if path not in paths}, key=key) | own

    def update(rule_params, state, grads, params, step):
        moving = {path: p for path, p in params.items() if path not in paths}
        moved, state = rule.update(rule_params, state, grads, moving, step)
        own = {path: rule_params[f"step.{path}"][min(step, num_steps - 1)] for path in paths}
        return {path: own[path] if path in own else moved[path] for path in params}, state

    def start(params):
        return rule.start({path: p for path, p in params.items() if path not in paths})

    return UpdateRule(update, init, start)


def step_weights(progress: mx.array, num_steps: int) -> mx.array:
    """Weights (`num_steps`,) of each step's query loss: equal at `progress` 0, nearly all on the last step at 1."""
    least = 0.03 / num_steps
    early = mx.maximum((1 - progress) / num_steps, least)
    return mx.concatenate([mx.broadcast_to(early, (num_steps - 1,)), (1 - (num_steps - 1) * early)[None]])


def maml_pp(rule: UpdateRule, *, multi_step_iterations: int, first_order_iterations: int) -> Learner:
    """MAML with a multi-step loss and derivative-order annealing; each phase computes what it needs and no more.

    Args:
        rule: the update rule.
        multi_step_iterations: iterations over which the outer loss moves from all steps to the last; 0: last only.
        first_order_iterations: iterations before the inner gradients are differentiated through.
    """

    def multi_step(base: Learner) -> MetaGrad:
        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            weights = step_weights(iteration / multi_step_iterations, num_steps)

            def task(meta, sx, sy, qx, qy, key):
                inner, outer = mx.random.split(key)
                after: dict[int, Any] = {}
                last = base.adapt(problem, meta, sx, sy, key=inner, num_steps=num_steps, each=after.__setitem__)
                loss, metrics = query_metrics(learner, problem, last, Episode(sx, sy, qx, qy), outer)
                earlier = [
                    problem.criterion(learner.predict(problem, after[k], qx, key=outer), qy)
                    for k in range(1, num_steps)
                ]
                return mx.sum(weights * mx.stack([*earlier, loss])), metrics

            return mean_gradient(task, meta, stack, keys)

        return meta_grad

    def last_step(base: Learner) -> MetaGrad:
        return lambda _learner, *args, **named: base.meta_grad(base, *args, **named)

    orders = {first: maml(rule, second_order=not first) for first in (True, False)}
    phases = {
        (several, first): (multi_step if several else last_step)(base)
        for several in (True, False)
        for first, base in orders.items()
    }

    def phase(iteration: int) -> MetaGrad:
        return phases[iteration < multi_step_iterations, iteration < first_order_iterations]

    return orders[False]._replace(meta_grad=phases[multi_step_iterations > 0, False], phase=phase)


class MAMLPlusPlusLearner(MetaLearner):
    """MAML++: MAML with learned per-layer, per-step rates, a loss over all steps, and a gentler start.

    With every option off (`lslr=False, multi_step_iterations=0, per_step_norm=False`) it is MAML.

    Options:
        lslr: learn a rate for each parameter array and step, from `inner_lr` on.
        multi_step_iterations: iterations over which the outer loss is annealed from the mean over all inner steps to
            the last one, which is all that counts from then on, as in the paper's code; 0 for the last alone.
        first_order_iterations: iterations for which the inner gradients count as constants; 0 for none.
        per_step_norm: the scale and shift of normalisation layers are learned for every step, and not adapted.
        cosine_iterations: iterations over which `outer_lr` falls to 1 % of itself along a cosine; None holds it.

    Reference: A. Antoniou, H. Edwards, A. Storkey, *How to Train Your MAML*, ICLR 2019, arXiv:1810.09502.
    Differs from the paper in: normalisation uses the statistics of its batch (as the paper's code does in fact), so
    there are none to keep for each step.
    """

    algorithm = "maml++"
    per_step_rule = True

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.01,
        outer_lr: Rate = 0.001,
        num_inner_steps: int = 5,
        **options: Any,
    ):
        over = self._checked({"cosine_iterations": options.get("cosine_iterations")})["cosine_iterations"]
        if over is not None:
            if callable(outer_lr) or isinstance(options.get("outer_optimizer"), optim.Optimizer):
                raise ConfigurationError(
                    "cosine_iterations is a schedule of its own for outer_lr; leave it out where the optimiser has one"
                )
            check_positive(outer_lr=outer_lr)
            outer_lr = schedule("cosine", outer_lr, over, end=0.01 * outer_lr)
        super().__init__(model, inner_lr, outer_lr, num_inner_steps, **options)

    def build(
        self,
        *,
        lslr: bool = True,
        multi_step_iterations: Steps = 10_000,
        first_order_iterations: Steps = 0,
        per_step_norm: bool = True,
        cosine_iterations: Count | None = None,
    ) -> Learner:
        rule = learned_rates(self.num_inner_steps, self.inner_lr) if lslr else sgd(self.inner_lr)
        paths = norm_paths(self._model) if per_step_norm and self.num_inner_steps else ()
        if paths:
            if not trainable(self._model).keys() - set(paths):
                raise ModelError(
                    f"{type(self._model).__name__} has only normalisation layers to train, which are learned for "
                    "every step and not adapted, so no support would count; set per_step_norm: false"
                )
            rule = per_step(rule, paths, self.num_inner_steps)
        if not self.num_inner_steps:
            multi_step_iterations = 0  # the start has the only loss
        if not multi_step_iterations and not first_order_iterations:
            return maml(rule)
        return maml_pp(rule, multi_step_iterations=multi_step_iterations, first_order_iterations=first_order_iterations)


class LSLRLearner(MetaLearner):
    """MAML with learned per-layer, per-step rates alone (LSLR), which all start at `inner_lr`.

    With one inner step these are the per-layer rates ("LayerLR") of Park & Oliva (2019).

    Options:
        first_order: count the inner gradients as constants.

    Reference: A. Antoniou, H. Edwards, A. Storkey, *How to Train Your MAML*, ICLR 2019, arXiv:1810.09502.
    """

    algorithm = "lslr"
    per_step_rule = True

    def build(self, *, first_order: bool = False) -> Learner:
        return maml(learned_rates(self.num_inner_steps, self.inner_lr), second_order=not first_order)


def norm_paths(model: nn.Module) -> tuple[str, ...]:
    """Trainable parameters of the model's normalisation layers, of one that is used several times once."""
    listed = trainable(model)
    return tuple(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path and isinstance(module, NORMS)
        for name in module.trainable_parameters()
        if f"{path}.{name}" in listed
    )

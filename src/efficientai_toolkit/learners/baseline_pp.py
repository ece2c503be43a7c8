"""Baseline++ (Chen, Liu, Kira, Wang & Huang 2019): no meta-learning at all, and a cosine head."""

from __future__ import annotations

import mlx.core as mx

from ..nn.functional import trainable
from ..nn.losses import accuracy, has_accuracy, is_classification
from ..settings import Count, Positive
from .base import MetaLearner
from .inner_loop import inner_loop
from .labels import check_range, classes
from .learner import Learner, mean_gradient
from .metric import embedder, embedding_size, head_shape, one_hot, present, rule_out, unit
from .update_rules import sgd

HEAD = "head"


class BaselinePlusPlus(MetaLearner):
    """Ordinary joint training of encoder and cosine classifier; on a new task a fresh cosine head on frozen features.

    Meta-training pools support and query of all tasks, and takes their labels as they are: the classes of the whole
    training set, 0 … `num_base_classes` − 1. By configuration, `train` numbers and counts them; in code,
    `TaskConfig(…, task_params={"labels": "split"})` numbers them and `num_labels(tasks)` counts them. A new task's head
    takes `num_inner_steps` steps of rate `inner_lr` (the paper: 100) from a small random start.

    Options:
        num_base_classes: classes in training; by default the size of the model's head, by configuration the training
            split's.
        scale: factor of the cosines.
        embedding_dim: size of the embedding, where the model does not tell.

    Reference: W.-Y. Chen, Y.-C. Liu, Z. Kira, Y.-C. Wang, J.-B. Huang, *A Closer Look at Few-shot Classification*,
    ICLR 2019, arXiv:1904.04232. Differs from the paper in: the new head's steps see the whole support.
    """

    algorithm = "baseline++"
    only = "classification"
    has_slots = True
    joint = True

    def build(
        self, *, num_base_classes: Count | None = None, scale: Positive = 10.0, embedding_dim: Count | None = None
    ) -> Learner:
        size = embedding_dim or embedding_size(self._model, self._head)
        embed = embedder(self._model, self._head, size)
        count = num_base_classes or trainable(self._model)[head_shape(self._model, self._head)[0]].shape[0]
        rule = sgd(self.inner_lr)

        def cosines(head, z):
            return scale * unit(z) @ unit(head).T

        def init(params, *, key):
            return {"model": params, "rule": {"base": mx.random.normal((count, size), key=key) * size**-0.5}}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            model = meta["model"]
            slots = classes(problem, model, support_y)
            having = present(one_hot(support_y, slots))
            z = embed(problem, model, support_x)

            def loss(p, z, y, *, key=None):
                return problem.criterion(rule_out(cosines(p[HEAD], z), having), y)

            def state(p):
                return {"model": model, "having": having, **p}

            start, inner = mx.random.split(mx.random.key(0) if key is None else key)
            end = inner_loop(
                loss,
                {HEAD: mx.random.normal((slots, size), key=start) * size**-0.5},
                z,
                support_y,
                rule=rule,
                rule_params={},
                num_steps=num_steps,
                second_order=False,
                key=inner,
                each=None if each is None else lambda k, p: each(k, state(p)),
            )
            return state(end)

        def predict(problem, fast, x, *, key=None):
            z = embed(problem, fast["model"], x, key=key)
            return rule_out(cosines(fast[HEAD], z), fast["having"])

        def meta_grad(learner, problem, meta, stack, *, keys, num_steps, iteration):
            classes(problem, meta["model"], stack.support_y[0])  # or it says that it is for classes

            def task(meta, sx, sy, qx, qy, key):
                z = embed(problem, meta["model"], mx.concatenate([sx, qx]), key=key)
                logits = cosines(meta["rule"]["base"], z)
                size = sx.shape[0]
                metrics = {
                    "query_loss": problem.criterion(logits[size:], qy),
                    "support_loss": problem.criterion(logits[:size], sy),
                }
                if has_accuracy(logits[size:], qy):
                    metrics["query_accuracy"] = accuracy(logits[size:], qy)
                loss = problem.criterion(logits, mx.concatenate([sy, qy]))
                return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}

            return mean_gradient(task, meta, stack, keys)

        return Learner(adapt, init, predict, meta_grad)

    def _check_labels(self, stacks, loss_fn, *, training=False):
        count = self._meta["rule"]["base"].shape[0]
        if not training:
            super()._check_labels(stacks, loss_fn)
        elif loss_fn is None:
            for stack in stacks:
                if is_classification(stack.support_y):
                    check_range(stack, count, f"num_base_classes is {count}")

"""Learning without forgetting."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .loss import masked
from .strategy import Lesson, Strategy, check

_ROWS = 1024


class LearningWithoutForgetting(Strategy):
    """The outputs that the model gave before a context, on that context's inputs, are kept by distillation.

    L = CE + weight · Σ_k KD_k, KD = −Σ_c softmax(z_old / T)_c log softmax(z / T)_c: one term a former context k, over
    the classes of k where the task is known, else over all former outputs (with as many equal terms as there are
    former contexts in domain-incremental learning, and one in class-incremental).

    Args:
        temperature: T.
        weight: of the distillation.

    Reference: Li & Hoiem (2017), Learning without forgetting, TPAMI; weights of the terms in task- and domain-
        incremental learning as in van de Ven & Tolias (2019), Three scenarios for continual learning.
    Differs from the paper in: no warm-up of the new head; the old outputs are computed once a context.
    Differs from van de Ven & Tolias' code in: in class-incremental learning the distillation weighs as much as the
        cross entropy, there k − 1 times as much in context k; nor is it multiplied by T², as in public copies of their
        code of that time (in their repository of 2022 only with `norm=True`).
    """

    name = "lwf"

    def __init__(self, temperature: float = 2.0, weight: float = 1.0):
        self.temperature = check(temperature, "temperature", strict=True)
        self.weight = check(weight, "weight")

    def begin(self, state, lesson: Lesson):
        if lesson.number == 0:
            return state, {}
        step = mx.compile(lambda params, x: lesson.apply(params, x).astype(mx.float32))
        rows = range(0, len(lesson.y), _ROWS)
        logits = np.concatenate([np.array(step(lesson.params, mx.array(lesson.x[i : i + _ROWS]))) for i in rows])
        width = logits.shape[-1]
        # Which outputs each term is over, in the old model and in the new: (terms, C).
        if lesson.kind == "task":
            old = new = np.broadcast_to(np.array(lesson.active), (lesson.active.shape[0], width))
            scale = np.arange(len(old)) < lesson.number
        else:
            old = np.broadcast_to(np.array(lesson.before)[:1], (1, width))
            new = np.broadcast_to(np.array(lesson.active)[:1], (1, width))
            scale = np.array([lesson.number if lesson.kind == "domain" else 1])
        terms = {"old": mx.array(old), "new": mx.array(new), "scale": mx.array(scale.astype(np.float32))}
        return terms, {"teacher": logits, "teacher_weight": np.ones(len(logits), np.float32)}

    def penalty(self, state, params, logits, batch):
        if "teacher" not in batch:
            return None
        return self.weight * self.distillation(logits, batch["teacher"], batch["teacher_weight"], **state)

    def distillation(self, logits, teacher, rows, old, new, scale):
        """Σ_k scale_k · mean over the rows of KD_k; `rows` (B,) is 1 for rows that have a teacher, else 0."""
        t = self.temperature
        target = mx.softmax(masked(teacher[None] / t, old[:, None]), axis=-1)
        student = masked(logits[None] / t, new[:, None])
        log_p = student - mx.logsumexp(student, axis=-1, keepdims=True)
        terms = -mx.sum(target * log_p, axis=-1)  # (terms, B)
        return mx.sum(scale * (terms @ rows)) / mx.maximum(mx.sum(rows), 1)

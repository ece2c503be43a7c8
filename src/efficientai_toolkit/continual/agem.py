"""Averaged gradient episodic memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..nn.functional import Parameters
from .memory import Memory
from .strategy import Batch, Lesson, State, Strategy, check_rows, current_rows


class AveragedGEM(Strategy):
    """A step must not raise the loss on rows drawn from the memory: where g · r < 0, g ← g − (g · r / r · r) r.

    Args:
        capacity, policy, per_group: see `Memory`.
        replay_size: rows for the reference gradient r; default as many as are current.

    Reference: Chaudhry et al. (2019), Efficient lifelong learning with A-GEM, ICLR.
    Differs from the paper in: rows are offered to the memory at the end of a context.
    """

    name = "agem"

    def __init__(
        self,
        capacity: int = 1000,
        *,
        policy: str = "balanced",
        per_group: int | None = None,
        replay_size: int | None = None,
    ):
        self.memory = Memory(capacity, policy, per_group)
        self.capacity, self.policy, self.per_group = capacity, policy, per_group
        self.replay_size = check_rows(replay_size, "replay_size")

    def extend(self, batch: Batch, rng: np.random.Generator) -> Batch:
        if len(self.memory) == 0:
            return batch
        rows = self.memory.draw(self.replay_size or int(current_rows(batch).sum()), rng)
        rows["weight"] = np.full(len(rows["y"]), 1 / len(rows["y"]), np.float32)
        return {**batch, "reference": rows}

    def gradient(self, state, grads, loss_grad, batch):
        return project(grads, loss_grad(batch["reference"])) if "reference" in batch else grads

    def end(self, state: State, lesson: Lesson) -> State:
        order = lesson.rng.permutation(len(lesson.y))
        self.memory.add({"x": lesson.x[order], "y": lesson.y[order], "context": lesson.contexts[order]}, lesson.rng)
        return state


def project(grads: Parameters, reference: Parameters) -> Parameters:
    """`grads`, or where it opposes `reference` its nearest gradient that does not."""
    along = sum(mx.sum(g * reference[path]) for path, g in grads.items())
    length = sum(mx.sum(mx.square(r)) for r in reference.values())
    # Of a reference without length nothing is taken away.
    step = mx.minimum(along, 0.0) / mx.where(length > 0, length, 1.0)
    return {path: g - step * reference[path] for path, g in grads.items()}

"""Dark experience replay."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .memory import Memory
from .strategy import Batch, Strategy, check, check_rows, current_rows, join


class DarkReplay(Strategy):
    """L = CE(batch) + α MSE(z(m₁), z_then(m₁)) + β CE(m₂): the outputs are held where they were, too (DER++).

    m₁ and m₂ are two draws from a reservoir into which every batch is offered with the outputs that it had.

    Args:
        capacity, policy, per_group: see `Memory`.
        alpha, beta: weights of the outputs and of the labels; β = 0 is DER.
        replay_size: rows of each draw; default as many as are current.

    Reference: Buzzega et al. (2020), Dark experience for general continual learning, NeurIPS.
    """

    name = "derpp"

    def __init__(
        self,
        capacity: int = 1000,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        policy: str = "reservoir",
        per_group: int | None = None,
        replay_size: int | None = None,
    ):
        self.alpha, self.beta = check(alpha, "alpha"), check(beta, "beta")
        self.memory = Memory(capacity, policy, per_group)
        self.capacity, self.policy, self.per_group = capacity, policy, per_group
        self.replay_size = check_rows(replay_size, "replay_size")

    def extend(self, batch: Batch, rng: np.random.Generator) -> Batch:
        if len(self.memory) == 0:
            return batch
        count = self.replay_size or int(current_rows(batch).sum())
        dark, labelled = self.memory.draw(count, rng), self.memory.draw(count, rng)
        n = len(dark["y"])
        dark |= {"weight": np.zeros(n, np.float32), "then_weight": np.full(n, self.alpha / n, np.float32)}
        labelled["weight"] = np.full(n, self.beta / n, np.float32)
        labelled["then_weight"] = np.zeros(n, np.float32)
        return join([batch, dark, labelled])

    def penalty(self, state, params, logits, batch):
        if "then_weight" not in batch:
            return None
        squares = mx.mean(mx.square(logits.astype(mx.float32) - batch["then"]), axis=-1)
        return mx.sum(batch["then_weight"] * squares)

    def observe(self, batch: Batch, logits, rng: np.random.Generator) -> None:
        rows = {name: batch[name] for name in ("x", "y", "context")}
        self.memory.add({**rows, "then": logits()}, rng)

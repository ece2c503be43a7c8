"""Experience replay."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigurationError
from .memory import Memory
from .strategy import Batch, Lesson, State, Strategy, check_rows, current_rows, join

WEIGHTINGS = ("contexts", "rows")


class Replay(Strategy):
    """Every batch is joined by as many rows from a bounded memory of former contexts.

    Args:
        capacity, policy, per_group: see `Memory`.
        online: offer rows to the memory with every batch (a stream); otherwise all of a context at its end.
        weighting: "contexts" gives the current context 1/k of the loss after k contexts (van de Ven & Tolias 2019),
            "rows" every row the same (Chaudhry et al. 2019).
        replay_size: rows from the memory a batch; default as many as are current.

    Reference: Chaudhry et al. (2019), On tiny episodic memories in continual learning.
    """

    name = "replay"

    def __init__(
        self,
        capacity: int = 1000,
        *,
        policy: str = "balanced",
        per_group: int | None = None,
        online: bool = False,
        weighting: str = "contexts",
        replay_size: int | None = None,
    ):
        if weighting not in WEIGHTINGS:
            raise ConfigurationError(f"weighting={weighting!r}: use one of {', '.join(WEIGHTINGS)}")
        self.memory = Memory(capacity, policy, per_group)
        self.capacity, self.policy, self.per_group = capacity, policy, per_group
        self.online, self.weighting = online, weighting
        self.replay_size = check_rows(replay_size, "replay_size")
        self._former = 0  # contexts before the current one

    def begin(self, state, lesson: Lesson):
        self._former = lesson.number
        return state, {}

    def extend(self, batch: Batch, rng: np.random.Generator) -> Batch:
        if len(self.memory) == 0 or (self._former == 0 and self.weighting == "contexts"):
            return batch
        mine = current_rows(batch)
        count = int(mine.sum())
        replayed = self.memory.draw(self.replay_size or count, rng)
        n = len(replayed["y"])
        current = 1 / (self._former + 1) if self.weighting == "contexts" else count / (count + n)
        replayed["weight"] = np.full(n, (1 - current) / n, np.float32)
        weight = batch["weight"] * np.where(mine, current, 1).astype(np.float32)
        return join([{**batch, "weight": weight}, replayed])

    def observe(self, batch: Batch, logits, rng: np.random.Generator) -> None:
        if self.online:
            self.memory.add({name: batch[name] for name in ("x", "y", "context")}, rng)

    def end(self, state: State, lesson: Lesson) -> State:
        if not self.online:
            order = lesson.rng.permutation(len(lesson.y))
            self.memory.add({"x": lesson.x[order], "y": lesson.y[order], "context": lesson.contexts[order]}, lesson.rng)
        return state

"""A meta-trained MeLPA learner as one that learns context after context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..learners.melpa import MeLPALearner
from ..nn.functional import Parameters, functional
from ..nn.trees import flatten


class Sequence:
    """A MeLPA learner as a learner of contexts: shared adapters, a head for each context.

    Args:
        learner: meta-trained.
        steps: in a context, each on all of its training set.
    """

    def __init__(self, learner: MeLPALearner, steps: int):
        self.learner, self.steps = learner, steps
        self.apply = functional(learner.model)
        self.params: Parameters | None = None
        self.heads: list[Parameters] = []

    @property
    def num_parameters(self) -> int:
        """Of the adapters and one head."""
        return self.learner.num_trainable

    @property
    def memory_bytes(self) -> int:
        """Bytes of what was meta-learned beside the start (initialisation network, rates) and of the other heads."""
        kept = flatten({"rule": self.learner.meta["rule"], "heads": dict(enumerate(self.heads[1:]))})
        return sum(array.nbytes for array in kept.values())

    def learn(self, x: Any, y: Any, *, active: Any, each: Callable[[int], None] | None = None) -> dict[str, float]:
        paths, first = self.learner.problem().head_paths, int(np.flatnonzero(active[len(self.heads)])[0])
        before, self.heads = self.params, [*self.heads, {}]

        def here(step: int, params: Parameters) -> None:
            mx.eval(params)
            self.params, self.heads[-1] = params, {path: params[path] for path in paths}
            if each is not None:
                each(step)

        x, labels = mx.array(x), mx.array(np.asarray(y) - first)
        self.learner.learn_next(before, x, labels, self.steps, each=here)  # the last call has the weights at the end
        return {"steps": self.steps}

    def evaluate(self, x: Any, y: Any, active: Any = None, context: int | None = None) -> float:
        """Accuracy with the head of `context`; of one to come, that of the latest."""
        if self.params is None or context is None:
            return 1 / int(np.sum(active))
        params = {**self.params, **self.heads[min(context, len(self.heads) - 1)]}
        labels = np.asarray(y) - int(np.flatnonzero(active)[0])
        logits = [self.apply(params, mx.array(x[i : i + 100])) for i in range(0, len(labels), 100)]
        return float((np.array(mx.argmax(mx.concatenate(logits), axis=-1)) == labels).mean())

    def state(self) -> dict[str, mx.array]:
        arrays = {f"params/{path}": a for path, a in (self.params or {}).items()}
        return arrays | {f"heads/{n}/{path}": a for n, head in enumerate(self.heads) for path, a in head.items()}

    def load_state(self, arrays: Mapping[str, mx.array]) -> None:
        own = {n.removeprefix("params/"): a for n, a in arrays.items() if n.startswith("params/")}
        self.params = own or None
        count = len({name.split("/")[1] for name in arrays if name.startswith("heads/")})
        self.heads = [
            {n.split("/", 2)[2]: a for n, a in arrays.items() if n.startswith(f"heads/{k}/")} for k in range(count)
        ]

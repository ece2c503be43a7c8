"""Almost no inner loop (Raghu et al. 2020): only the head adapts."""

from __future__ import annotations

from ..errors import ConfigurationError, ModelError, did_you_mean
from ..nn.functional import Parameters, trainable
from .base import MetaLearner
from .inner_loop import by_steps
from .learner import Learner, Problem
from .update_rules import sgd


class ANILLearner(MetaLearner):
    """MAML whose inner steps change the head alone; the outer step changes everything.

    Options:
        first_order: count the inner gradients as constants.
        adapts: parameter paths or prefixes (`["head", "layers.1"]`) to adapt instead of the head; `["*"]` is MAML.

    Reference: A. Raghu, M. Raghu, S. Bengio, O. Vinyals, *Rapid Learning or Feature Reuse?*, ICLR 2020,
    arXiv:1909.09157. The features are computed once per step here, not once per task: MLX's compiler shares them.
    """

    algorithm = "anil"

    def build(self, *, first_order: bool = False, adapts: list[str] | None = None) -> Learner:
        chosen = None if adapts is None else _chosen(trainable(self._model), adapts)
        paths = _head if chosen is None else lambda problem: chosen
        return Learner(by_steps(sgd(self.inner_lr), adapts=paths, second_order=not first_order))


def _head(problem: Problem) -> tuple[str, ...]:
    if not problem.head_paths:
        raise ModelError("ANIL adapts the head, and the model has none that is trainable; name it by head='…'")
    return problem.head_paths


def _chosen(params: Parameters, prefixes: list[str]) -> tuple[str, ...]:
    """The paths that the prefixes stand for; each must stand for one at least."""

    def under(path: str, prefix: str) -> bool:
        return prefix == "*" or f"{path}.".startswith(f"{prefix}.")

    for prefix in prefixes:
        if not any(under(path, prefix) for path in params):
            known = {".".join(path.split(".")[: 1 + prefix.count(".")]) for path in params}
            raise ConfigurationError(f"adapts: {prefix!r} matches no trainable parameter{did_you_mean(prefix, known)}")
    if not prefixes:
        raise ConfigurationError("adapts names nothing to adapt; leave it out for the head")
    return tuple(path for path in params if any(under(path, prefix) for prefix in prefixes))

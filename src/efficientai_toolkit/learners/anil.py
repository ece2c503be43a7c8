"""Almost no inner loop (Raghu et al. 2020): only the head adapts."""

from __future__ import annotations

from ..errors import ModelError
from .base import MetaLearner
from .inner_loop import inner_loop
from .learner import Learner
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
        rule = sgd(self.inner_lr)

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            return inner_loop(
                problem.loss,
                meta["model"],
                support_x,
                support_y,
                rule=rule,
                rule_params={},
                num_steps=num_steps,
                adapts=_chosen(meta["model"], adapts, problem.head_paths),
                second_order=not first_order,
                key=key,
                each=each,
            )

        return Learner(adapt)


def _chosen(params, prefixes, head_paths):
    if prefixes is None:
        if not head_paths:
            raise ModelError("ANIL adapts the head, and the model has none that is trainable; name it by head='…'")
        return head_paths
    if "*" in prefixes:
        return tuple(params)
    paths = tuple(p for p in params if any(p == prefix or p.startswith(prefix + ".") for prefix in prefixes))
    if not paths:
        raise ModelError(f"adapts={prefixes} matches no parameter; there are {', '.join(params)}")
    return paths

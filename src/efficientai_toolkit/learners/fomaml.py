"""First-order MAML (Finn et al. 2017, section 5.2): MAML whose inner gradients count as constants."""

from __future__ import annotations

from .base import MetaLearner
from .learner import Learner
from .maml import maml
from .update_rules import sgd


class FOMAMLLearner(MetaLearner):
    """First-order MAML: the meta-gradient is the plain query gradient at the adapted weights.

    θ ← θ − β Σ_tasks ∇L_query(θ′), θ′ = θ − α ∇L_support(θ), repeated.

    Reference: C. Finn, P. Abbeel, S. Levine, ICML 2017, arXiv:1703.03400; the name is of Nichol et al. 2018.
    """

    algorithm = "fomaml"

    def build(self) -> Learner:
        return maml(sgd(self.inner_lr), second_order=False)

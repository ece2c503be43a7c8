"""Proto-MAML (Triantafillou et al. 2020): MAML whose head starts, in every task, as a prototypical network's."""

from __future__ import annotations

import mlx.core as mx

from ..errors import ConfigurationError, TaskSamplingError, did_you_mean
from ..nn.losses import is_classification
from ..settings import Positive
from .base import MetaLearner
from .inner_loop import by_steps
from .learner import Learner
from .metric import DISTANCES, class_means, cosine_head, head_shape, one_hot, present
from .update_rules import sgd


class ProtoMAMLLearner(MetaLearner):
    """MAML over the features and a head that is computed from the support: W_k = 2 c_k, b_k = −‖c_k‖², c_k the mean
    feature of class k, which classifies as the nearest c_k does. The inner steps change all of it; the meta-gradient
    passes through the steps and through the head's start. The head's own weights only say how many classes there are.

    Options:
        distance_metric: "euclidean" (the paper's head, above), or "cosine": logits near `scale` · cosine(f(x), c_k).
        scale: factor of the cosines.
        first_order: count the inner gradients as constants (the paper's fo-Proto-MAML); the head's start is
            differentiated all the same.

    Reference: E. Triantafillou et al., *Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples*,
    ICLR 2020, arXiv:1903.03096. Cosines are an addition: they suit encoders that were pre-trained with them.
    """

    algorithm = "proto_maml"
    only = "classification"

    def build(
        self, *, distance_metric: str = "euclidean", scale: Positive = 10.0, first_order: bool = False
    ) -> Learner:
        if distance_metric not in DISTANCES:
            raise ConfigurationError(
                f"unknown distance_metric {distance_metric!r}{did_you_mean(distance_metric, DISTANCES)}"
            )
        weight, bias = head_shape(self._model, self._head)

        def head_of(problem, params, x, y):
            z = problem.features(params, x).reshape(x.shape[0], -1)
            support = one_hot(y, params[weight].shape[0])
            if distance_metric == "cosine":
                return cosine_head(z, support, scale)
            means = class_means(z, support)
            lengths = mx.sum(mx.square(means), axis=-1)
            # A class without examples would be at the origin; it starts below the others.
            return 2 * means, -mx.where(present(support), lengths, 4 * mx.stop_gradient(mx.max(lengths)))

        def start(problem, meta, support_x, support_y):
            if not is_classification(support_y):
                raise TaskSamplingError("Proto-MAML is for classification: the targets must be integer classes")
            rows, biases = head_of(problem, meta["model"], support_x, support_y)
            params = meta["model"]
            return {**params, weight: rows.astype(params[weight].dtype), bias: biases.astype(params[bias].dtype)}

        return Learner(by_steps(sgd(self.inner_lr), start=start, second_order=not first_order))

"""Prototypical networks (Snell, Swersky & Zemel 2017)."""

from __future__ import annotations

from ..errors import ConfigurationError, did_you_mean
from ..settings import Positive
from .labels import classes
from .learner import Learner
from .metric import (
    DISTANCES,
    MetricLearner,
    class_means,
    embedder,
    one_hot,
    present,
    rule_out,
    squared_distances,
    unit,
)


class PrototypicalNetwork(MetricLearner):
    """A class is the mean of its support's embeddings; logits are −‖f(x) − c‖², or scaled cosines.

    The model is the encoder: its features where it has a method `features` (or a `head` is named), else its output.
    Ways may differ between training and test (more classes in training is what the paper advises). Logits have a
    column for every class that the support might hold; those of classes it lacks are far below the others.

    Example:
        >>> network = PrototypicalNetwork(encoder, distance_metric="euclidean", outer_lr=1e-3)
        >>> network.train_episodes(episodes)
        >>> network.classify(queries, samples, ["cat", "dog", "cat", "owl"])

    Options:
        distance_metric: "euclidean" (squared, as in the paper) or "cosine".
        scale: factor of the cosines.

    Reference: J. Snell, K. Swersky, R. Zemel, *Prototypical Networks for Few-shot Learning*, NeurIPS 2017,
    arXiv:1703.05175.
    """

    algorithm = "protonet"

    def build(self, *, distance_metric: str = "euclidean", scale: Positive = 10.0) -> Learner:
        if distance_metric not in DISTANCES:
            raise ConfigurationError(
                f"unknown distance_metric {distance_metric!r}{did_you_mean(distance_metric, DISTANCES)}"
            )
        embed = embedder(self._model, self._head)

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            model = meta["model"]
            support = one_hot(support_y, classes(problem, model, support_y))
            prototypes = class_means(embed(problem, model, support_x, key=key), support)
            return {"model": model, "prototypes": prototypes, "having": present(support)}

        def predict(problem, fast, x, *, key=None):
            z, prototypes = embed(problem, fast["model"], x, key=key), fast["prototypes"]
            if distance_metric == "cosine":
                return rule_out(scale * unit(z) @ unit(prototypes).T, fast["having"])
            return rule_out(-squared_distances(z, prototypes), fast["having"])

        return Learner(adapt, predict=predict)

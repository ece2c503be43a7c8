"""Relation networks (Sung et al. 2018): the distance is learned."""

from __future__ import annotations

import mlx.core as mx

from ..backbones.mlp import MLP
from ..nn.functional import functional, trainable
from ..settings import Count
from .labels import classes
from .learner import Learner
from .metric import MetricLearner, class_means, embedder, embedding_size, one_hot, present, rule_out


def score_error(scores: mx.array, y: mx.array) -> mx.array:
    """Squared error of the relation scores sigmoid(`scores`) (Q, C) against one-hot classes, mean over queries."""
    return mx.mean(mx.sum(mx.square(mx.sigmoid(scores) - one_hot(y, scores.shape[-1])), axis=-1))


class RelationNetwork(MetricLearner):
    """A small network compares a query's embedding with each class's, concatenated; trained by squared error.

    Predictions are the scores before their sigmoid. Without a `loss_fn` the loss, in training and in evaluation, is
    the paper's `score_error`.

    Options:
        hidden_dim: width of the relation module.
        embedding_dim: size of the embedding, where the model does not tell.

    Reference: F. Sung, Y. Yang, L. Zhang, T. Xiang, P. Torr, T. Hospedales, *Learning to Compare: Relation Network
    for Few-Shot Learning*, CVPR 2018, arXiv:1711.06025. Differs from the paper in: the relation module is two
    dense layers on embedding vectors, whatever the encoder, in place of convolutions on feature maps; a class is the
    mean, not the sum, of its embeddings, so that shots may vary.
    """

    algorithm = "relation"

    def build(self, *, hidden_dim: Count = 64, embedding_dim: Count | None = None) -> Learner:
        size = embedding_dim or embedding_size(self._model, self._head)
        embed = embedder(self._model, self._head, size)
        relate = functional(MLP(2 * size, 1, hidden_dim, 2))

        def init(params, *, key):
            own, _ = mx.random.split(key)  # `key` itself may have drawn an encoder that is an MLP of equal shapes
            return {"model": params, "rule": trainable(MLP(2 * size, 1, hidden_dim, 2, key=own))}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            labels = one_hot(support_y, classes(problem, meta["model"], support_y))
            means = class_means(embed(problem, meta["model"], support_x, key=key), labels)
            return {**meta, "means": means, "having": present(labels)}

        def predict(problem, fast, x, *, key=None):
            z, means = embed(problem, fast["model"], x, key=key), fast["means"]
            shape = (z.shape[0], means.shape[0], size)
            pairs = [mx.broadcast_to(means[None], shape), mx.broadcast_to(z[:, None], shape)]
            scores = relate(fast["rule"], mx.concatenate(pairs, axis=-1).reshape(-1, 2 * size))
            return rule_out(scores.reshape(shape[:2]), fast["having"])

        return Learner(adapt, init, predict, loss_fn=score_error)

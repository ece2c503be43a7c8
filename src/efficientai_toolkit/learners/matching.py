"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016)."""

from __future__ import annotations

import mlx.core as mx

from ..nn.functional import Parameters
from ..settings import Count, Steps
from .labels import classes
from .learner import Learner
from .metric import MetricLearner, embedder, embedding_size, one_hot, unit


def lstm_step(arrays: Parameters, name: str, x: mx.array, h: mx.array, c: mx.array) -> tuple[mx.array, mx.array]:
    """One step of the LSTM `name`: (N, D) inputs, (N, H) hidden, (N, D) cells → new hidden (N, D) and cells."""
    gates = x @ arrays[f"{name}.input"].T + h @ arrays[f"{name}.hidden"].T + arrays[f"{name}.bias"]
    i, f, g, o = mx.split(gates, 4, axis=-1)
    c = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
    return mx.sigmoid(o) * mx.tanh(c), c


def embed_support(arrays: Parameters, z: mx.array) -> mx.array:
    """g(x_i, S) = forward LSTM + backward LSTM + z_i over the support (S, D), in its order."""
    outputs = [z]
    for name, order in (("forward", range(len(z))), ("backward", reversed(range(len(z))))):
        h = c = mx.zeros((1, z.shape[1]))
        at = {}
        for i in order:
            h, c = lstm_step(arrays, name, z[i : i + 1], h, c)
            at[i] = h
        outputs.append(mx.concatenate([at[i] for i in range(len(z))]))
    return outputs[0] + outputs[1] + outputs[2]


def embed_query(arrays: Parameters, z: mx.array, support: mx.array, steps: int) -> mx.array:
    """f(x, S): an LSTM over `steps` reads of the support (S, D) by attention, for queries (Q, D)."""
    h, c, read = z, mx.zeros_like(z), mx.mean(support, axis=0, keepdims=True) + mx.zeros_like(z)
    for _ in range(steps):
        h, c = lstm_step(arrays, "attention", z, mx.concatenate([h, read], axis=-1), c)
        h = h + z
        read = mx.softmax(h @ support.T, axis=-1) @ support
    return h


class MatchingNetwork(MetricLearner):
    """A query's label is the mean of the support's labels, weighted by the softmax of scaled cosines.

    Predictions are log-probabilities; classes that the support lacks have probability 0.

    Options:
        full_context: full context embeddings (FCE): a bidirectional LSTM over the support, and for each query an
            LSTM that reads the support by attention.
        reads: steps of the latter.
        embedding_dim: size of the embedding, needed for FCE where the model does not tell.

    Reference: O. Vinyals et al., *Matching Networks for One Shot Learning*, NeurIPS 2016, arXiv:1606.04080.
    Differs from the paper in: the cosines are multiplied by a learned scale, without which the softmax over [−1, 1]
    can never be sharp.
    """

    algorithm = "matching"

    def build(self, *, full_context: bool = False, reads: Steps = 5, embedding_dim: Count | None = None) -> Learner:
        size = (embedding_dim or embedding_size(self._model, self._head)) if full_context else 0
        embed = embedder(self._model, self._head, size or None)

        def init(params, *, key):
            arrays = {"log_scale": mx.log(mx.array(10.0))}
            widths = {"forward": size, "backward": size, "attention": 2 * size} if full_context else {}
            for number, (name, width) in enumerate(widths.items()):
                one, two = mx.random.split(mx.random.split(key, 3)[number])
                arrays[f"{name}.input"] = mx.random.normal((4 * size, size), key=one) * size**-0.5
                arrays[f"{name}.hidden"] = mx.random.normal((4 * size, width), key=two) * width**-0.5
                arrays[f"{name}.bias"] = mx.zeros((4 * size,))
            return {"model": params, "rule": arrays}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            z = embed(problem, meta["model"], support_x, key=key)
            labels = one_hot(support_y, classes(problem, meta["model"], support_y))
            support = embed_support(meta["rule"], z) if full_context else z
            return {**meta, "support": support, "labels": labels}

        def predict(problem, fast, x, *, key=None):
            z = embed(problem, fast["model"], x, key=key)
            if full_context:
                z = embed_query(fast["rule"], z, fast["support"], reads)
            cosines = unit(z) @ unit(fast["support"]).T
            attention = mx.softmax(mx.exp(fast["rule"]["log_scale"]) * cosines, axis=-1)
            return mx.log(attention @ fast["labels"] + 1e-12)

        return Learner(adapt, init, predict)

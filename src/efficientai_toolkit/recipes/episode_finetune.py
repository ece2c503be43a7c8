"""Plain fine-tuning, anew in every episode: what meta-learning has to beat."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..backbones.bert import Encoder
from ..learners.metric import cosine_head, one_hot
from ..nn.functional import Parameters, functional, trainable
from ..nn.losses import cross_entropy_loss
from ..tasks.text import used_length
from .intents import Bench, Episodes, prefix_of

_HEAD = ("head.weight", "head.bias")
_TABLE, _INDEX = "embeddings.word_embeddings.weight", "embeddings.word_embeddings.index"
_ROWS = 64  # a table of used rows has a multiple of these, so that compiled graphs are used again


class UsedRows(nn.Module):
    """The rows of an embedding that an episode uses, in its place.

    Adam leaves a row without a gradient where it is. So the others need no gradient, no moments and no pass over
    memory, and they are half of the numbers of a small encoder.
    """

    def __init__(self, table: mx.array):
        super().__init__()
        self.weight = table
        self.index = mx.arange(table.shape[0])  # token id → row

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[self.index[ids]]


def finetune(
    model: Encoder, bench: Bench, episodes: Episodes, *, learning_rate: float, num_steps: int = 50
) -> np.ndarray:
    """Accuracy (episodes,) after Adam on the support from the model's own start, anew in every episode.

    The head starts at the class means of the support's features (as prototypes do), so that no step is spent on
    finding it; everything trainable is trained.
    """
    start = trainable(model)
    cached, labels, truth = prefix_of(model), episodes.labels("support").astype(np.int32), episodes.labels("query")
    embeddings: Any = model.embeddings
    words, table = embeddings.word_embeddings, start.get(_TABLE)
    if table is not None:
        embeddings.word_embeddings = UsedRows(table)
    apply, features = functional(model), functional(model, "features")

    def loss(params: Parameters, fixed: Parameters, parts: list[mx.array], y: mx.array) -> mx.array:
        logits = [apply({**params, **fixed}, x) for x in parts]
        return cross_entropy_loss(mx.concatenate(logits), y)

    gradient = mx.compile(mx.grad(loss))
    predict = mx.compile(lambda params, x: mx.argmax(apply(params, x), axis=-1))
    accuracies = []
    try:
        for support, query in zip(episodes.support, episodes.query, strict=True):
            # Queries apart: the longest of many would lengthen every step on a few supports.
            ids, pad = bench.data.ids[support], bench.data.pad_id
            groups = alike_in_length(ids, pad)
            parts, qx = (
                [cached(_trimmed(ids[rows], pad)) for rows in groups],
                cached(_trimmed(bench.data.ids[query], pad)),
            )
            y = mx.array(labels[np.concatenate(groups)])
            fixed: Parameters = {}
            params = dict(start)
            if table is not None:
                params[_TABLE], fixed[_INDEX] = _used(table, bench.data.ids[np.concatenate([support, query])])
            z = mx.concatenate([features({**params, **fixed}, x) for x in parts])
            params |= dict(zip(_HEAD, cosine_head(z, one_hot(y, episodes.way), 10.0), strict=True))
            optimizer = optim.Adam(learning_rate=learning_rate)
            for _ in range(num_steps):
                params = optimizer.apply_gradients(gradient(params, fixed, parts, y), params)
                mx.eval(params, optimizer.state)
            accuracies.append((np.array(predict({**params, **fixed}, qx)) == truth).mean())
    finally:
        embeddings.word_embeddings = words
    return np.array(accuracies)


def alike_in_length(ids: np.ndarray, pad_id: int) -> list[np.ndarray]:
    """The rows of `ids` (N, L) in one or two groups, such that the fewest tokens are computed in all."""
    lengths = np.array([used_length(row, pad_id) for row in ids])
    order = np.argsort(lengths, kind="stable")
    ordered, cut = lengths[order], np.arange(len(ids))  # rows in the first group; 0: one group
    tokens = cut * ordered[cut - 1] + (len(ids) - cut) * ordered[-1]
    return [group for group in np.split(order, [int(tokens.argmin())]) if len(group)]


def _trimmed(ids: np.ndarray, pad_id: int) -> mx.array:
    return mx.array(ids[:, : used_length(ids, pad_id)])


def _used(table: mx.array, ids: np.ndarray) -> tuple[mx.array, mx.array]:
    """Rows (U, d) of the table that `ids` name, filled up with its first row, and where each is: (vocabulary,)."""
    used = np.unique(ids)
    index = np.zeros(table.shape[0], np.int32)
    index[used] = np.arange(len(used))
    filled = np.zeros(-(-len(used) // _ROWS) * _ROWS, np.int64)
    filled[: len(used)] = used
    return table[mx.array(filled)], mx.array(index)

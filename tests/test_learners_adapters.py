"""Every learner over every adapter: meta-training lowers the held-out loss, and moves nothing but the adapter.

Both tables are iterated over: a new learner or adapter is held to this the day it is added. The models are tiny and
the steps few, so that hundreds of pairs take seconds.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from adapter_models import Decoder
from efficientai_toolkit import MLP, EpisodeStack, learner_class
from efficientai_toolkit.adapters import ADAPTERS, adapter_config, attach
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.nn.functional import trainable
from learner_cases import blobs

SEQUENCE_ONLY = {"prefix", "prefix_mlp", "prompt", "p_tuning"}
NUMBERS_ONLY = {"alpaca"}
# Not meta-learned: trained as one classifier, so its classes must be the same in every episode.
ONE_TASK = {"baseline++"}
SMALL = {
    "vera": {"rank": 4},
    "houlsby": {"bottleneck": 4},
    "pfeiffer": {"bottleneck": 4},
    "parallel": {"bottleneck": 4},
    "compacter": {"divisor": 2, "bottleneck": 4},
    "adalora": {"rank": 4},
    "p_tuning": {"hidden": 8},
    "prefix_mlp": {"hidden": 8},
}
STEPS, TASKS = 3, 24


def sequences(count: int, way: int = 3, shot: int = 2, query: int = 4, seed: int = 0) -> EpisodeStack:
    """Classes that draw their tokens from sets of their own, (count, way · shot, 5) ids below 12."""
    rng = np.random.default_rng(seed)
    sets = np.stack([rng.permutation(12).reshape(way, -1) for _ in range(count)])
    picks = rng.integers(0, 12 // way, (count, way, shot + query, 5))
    ids = np.take_along_axis(sets[:, :, None, :], picks, axis=3).astype(np.int32)
    y = np.broadcast_to(np.arange(way, dtype=np.int32)[:, None], ids.shape[:3])
    parts = (ids[:, :, :shot], y[:, :, :shot], ids[:, :, shot:], y[:, :, shot:])
    return EpisodeStack(*(mx.array(np.ascontiguousarray(a).reshape(count, -1, *a.shape[3:])) for a in parts))


def half_noise(count: int, seed: int) -> EpisodeStack:
    """Clouds in three dimensions, and three that say nothing in any task: that can be learned from all of them."""
    stack, keys = blobs(count, dim=3, seed=seed), mx.random.split(mx.random.key(seed))
    x = [
        mx.concatenate([x, 2 * mx.random.normal(x.shape, key=key)], axis=-1)
        for x, key in zip((stack.support_x, stack.query_x), keys, strict=True)
    ]
    return stack._replace(support_x=x[0], query_x=x[1])


def episodes(algorithm: str, count: int, seed: int, *, of_tokens: bool) -> EpisodeStack:
    if algorithm in ONE_TASK:
        count, seed = 1, 0
    stack = sequences(count, seed=seed) if of_tokens else half_noise(count, seed)
    if algorithm not in NUMBERS_ONLY:
        return stack
    # A number for each class instead of its index.
    as_number = [(y[..., None] - 1).astype(mx.float32) for y in (stack.support_y, stack.query_y)]
    return stack._replace(support_y=as_number[0], query_y=as_number[1])


def frozen(model: nn.Module) -> dict[str, mx.array]:
    own = trainable(model)
    return {path: array for path, array in tree_flatten(model.parameters()) if path not in own}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_it_learns_and_moves_nothing_but_the_adapter(algorithm, adapter):
    of_tokens, outputs = adapter in SEQUENCE_ONLY, 1 if algorithm in NUMBERS_ONLY else 3
    mx.random.seed(1)
    model = Decoder(8, 2, 1, 12, outputs) if of_tokens else MLP(6, outputs, 8, 2, key=mx.random.key(1))
    model = attach(model, adapter_config(adapter, **SMALL.get(adapter, {})), train_head=True, key=mx.random.key(2))
    before = frozen(model)
    mx.eval(before)
    learner = learner_class(algorithm)(model, 0.02, 0.005, 2, chunk=TASKS, compile=False)
    held_out = episodes(algorithm, TASKS, 99, of_tokens=of_tokens)

    def held_out_loss() -> float:
        if algorithm in ONE_TASK:
            return learner.meta_gradient(held_out)[0]["query_loss"].item()
        return learner.evaluate(held_out, num_adaptation_steps=(2,))["step_2_loss"]

    start = held_out_loss()  # what the adapter comes to where nothing is meta-learned
    for step in range(STEPS):
        learner.meta_update([episodes(algorithm, TASKS, step, of_tokens=of_tokens)])
    assert held_out_loss() < start
    after = frozen(learner.model)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[path], array) for path, array in before.items())

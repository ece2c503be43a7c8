"""Few-shot intent classification measured alike for every method: the same episodes, whole classes held out.

Methods that embed and compare (prototypes, logistic regression, a trained prototypical network) need every test text
encoded once; methods that take gradient steps adapt anew in every episode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backbones.bert import Encoder
from ..backbones.frozen_prefix import Cacheable, FrozenPrefix, frozen_layers
from ..nn.functional import functional, trainable
from ..runs.adapted import threshold_between
from ..runs.loaded import widen_head
from ..tasks.base import TaskConfig
from ..tasks.distribution import TaskDistribution
from ..tasks.episode import EpisodeStack
from ..tasks.intents import Intents
from ..tasks.storage import user_cache
from ..tasks.text import TextSet, used_length

if TYPE_CHECKING:
    from ..learners.base import MetaLearner

QUERY = 5  # query texts of each class in an episode
_BATCH = 32


class Setting(NamedTuple):
    """N-way K-shot."""

    way: int
    shot: int

    @property
    def name(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


SETTINGS = (Setting(5, 1), Setting(5, 5), Setting(20, 1), Setting(20, 5))


class RowNumbers(Intents):
    """The family `intents` with the number of a text in its data set in place of the text."""

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        return ()

    def gather(self, config: TaskConfig, rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return rows.astype(np.int32)

    def pack(self, config: TaskConfig, draw: tuple) -> tuple:
        return draw


class Episodes(NamedTuple):
    """Numbers of texts, so that every method sees the same episodes; labels are 0 … way − 1 in order."""

    support: np.ndarray  # (episodes, way · shot)
    query: np.ndarray  # (episodes, way · QUERY)
    way: int

    def labels(self, part: str) -> np.ndarray:
        rows = self.support if part == "support" else self.query
        return np.repeat(np.arange(self.way), rows.shape[1] // self.way)


class Bench:
    """The test classes of one data set.

    Args:
        dataset: "banking77" or "clinc150".
        data_dir: parent of the data sets.
        split: whose classes are drawn from.
    """

    def __init__(self, dataset: str, data_dir: Path | None = None, *, split: str = "test", **params: Any):
        self.dataset, self.split = dataset, split
        self.family = RowNumbers(data_dir)
        self.params = {"dataset": dataset, "split": split, **params}
        self.data: TextSet = self.family.data_set(self._config(Setting(2, 1)))

    def episodes(self, setting: Setting, count: int = 600, *, seed: int = 0) -> Episodes:
        """`count` episodes that depend on the data set, the setting and the seed alone."""
        name = f"{self.dataset} {self.split} {setting.name}"
        tasks = TaskDistribution(
            [self._config(setting)], seed, endless=True, families={"intents": self.family}, stream=name
        )
        drawn = [tasks.batch_at(i, 50)[0] for i in range(-(-count // 50))]
        support, query = (np.concatenate([np.array(d[part]) for d in drawn])[:count] for part in (0, 2))
        return Episodes(support, query, setting.way)

    def rows(self) -> np.ndarray:
        """Every text of the split's classes."""
        return np.concatenate([np.arange(*self.data.starts[c : c + 2]) for c in self.data.splits[self.split]])

    def _config(self, setting: Setting) -> TaskConfig:
        sizes = {"k_shot": setting.shot, "query_per_class": QUERY}
        return TaskConfig("episode", "intents", setting.way, task_params={**self.params, **sizes})


def encode(model: Encoder, bench: Bench) -> np.ndarray:
    """Unit features (M, d) of the texts of the split, at their numbers; the other rows are zero."""
    out = np.zeros((len(bench.data.ids), model.config.hidden_size), np.float32)
    rows = bench.rows()
    out[rows] = encode_ids(model, bench.data.ids[rows], bench.data.pad_id)
    return out


def encode_ids(model: Encoder, ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Token ids (N, L) → unit features (N, d), in batches of similar length."""
    features = functional(model, "features")
    step = mx.compile(lambda params, x: features(params, x))
    params, cached = trainable(model), prefix_of(model)
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    order = np.argsort((ids != pad_id).sum(1), kind="stable")
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        some = ids[rows][:, : used_length(ids[rows], pad_id)]
        # The last batch is filled up, so that it needs no graph of its own.
        filled = np.concatenate([some, np.repeat(some[-1:], _BATCH - len(some), axis=0)])
        z = np.array(step(params, cached(mx.array(filled))))[: len(rows)]
        out[rows] = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    return out


def prefix_of(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """The cache of an encoder's or language model's frozen layers, or the identity where there is nothing to keep."""
    layers = frozen_layers(model) if isinstance(model, Cacheable) else 0
    if not isinstance(model, Cacheable) or not layers or layers == len(model.layers):  # all frozen: nothing runs twice
        return lambda ids: ids
    return FrozenPrefix(model, user_cache() / "prefix")


def prototypes(z: np.ndarray, episodes: Episodes) -> np.ndarray:
    """Accuracy (episodes,) of the nearest class mean by cosine, from unit features (M, d)."""
    count, shots = len(episodes.support), episodes.support.shape[1] // episodes.way
    means = z[episodes.support].reshape(count, episodes.way, shots, -1).mean(2)
    means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
    logits = np.einsum("eqd,ecd->eqc", z[episodes.query], means, optimize=True)
    return (logits.argmax(-1) == episodes.labels("query")).mean(1)


def centred(z: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Unit features (M, d) with the mean of `known` (K, d), those of other classes, taken away, of length 1 again.

    Y. Wang, W.-L. Chao, K. Q. Weinberger, L. van der Maaten, *SimpleShot*, arXiv:1911.04623 (its CL2N).
    """
    moved = z - known.mean(0)
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


class NoneOfThese(NamedTuple):
    """How well a calibrated threshold tells texts of no label from those of the labels; means over episodes."""

    kept: float  # share of the labels' own texts that are given a label
    told_off: float  # share of the others that are not
    accuracy: float  # of the labels given to what is kept
    auroc: float  # of the scores, whatever the threshold


def none_of_these(
    z: np.ndarray, episodes: Episodes, background: np.ndarray, outside: np.ndarray, *, scale: float = 10.0
) -> NoneOfThese:
    """Prototypes with the threshold that `adapt --none-of-these` sets, from unit features.

    Args:
        z: (M, d) of the texts that episodes number.
        episodes: with at least two shots: one is held out in turn, and scored for the calibration.
        background: (B, d) of the texts outside all labels that calibrate.
        outside: (O, d) of those that are measured.
    """
    way, shots = episodes.way, episodes.support.shape[1] // episodes.way
    rows = []
    for support, query in zip(episodes.support, episodes.query, strict=True):
        own = z[support].reshape(way, shots, -1)

        def logits(x: np.ndarray, own: np.ndarray = own, left_out: int | None = None) -> np.ndarray:
            kept = own if left_out is None else np.delete(own, left_out, axis=1)
            means = kept.mean(1)
            return scale * x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T

        held = np.concatenate([_energy(logits(own[:, i], left_out=i)) for i in range(min(shots, 3))])
        threshold = threshold_between(held, _energy(logits(background)))
        inside, off = logits(z[query]), _energy(logits(outside))
        on, right = _energy(inside), inside.argmax(1) == episodes.labels("query")
        kept = on >= threshold
        ranks = np.searchsorted(np.sort(off), on, side="left") / len(off)
        rows.append((kept.mean(), (off < threshold).mean(), right[kept].mean() if kept.any() else 0.0, ranks.mean()))
    return NoneOfThese(*np.mean(rows, axis=0).tolist())


def _energy(logits: np.ndarray) -> np.ndarray:
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1))


def logistic_regression(z: np.ndarray, episodes: Episodes, *, c: float = 1.0) -> np.ndarray:
    """Accuracy (episodes,) of L2-regularised multinomial logistic regression on unit features (M, d)."""
    y, truth = episodes.labels("support"), episodes.labels("query")
    accuracies = []
    for support, query in zip(episodes.support, episodes.query, strict=True):
        weight, bias = fit_logistic(z[support], y, episodes.way, c=c)
        accuracies.append(((z[query] @ weight.T + bias).argmax(1) == truth).mean())
    return np.array(accuracies)


def fit_logistic(x: np.ndarray, y: np.ndarray, classes: int, *, c: float = 1.0, steps: int = 500):
    """(weight (C, d), bias (C,)) that minimise ½‖weight‖² + c Σ cross entropy; the bias is not penalised.

    Nesterov's accelerated gradient with the step of the bound on the curvature, until the gradient is small.
    """
    u, size, axes = np.linalg.svd(x.astype(np.float64), full_matrices=False)  # the weight lies in the span of x
    design = np.concatenate([u * size, np.ones((len(x), 1))], 1)
    penalty = np.ones((design.shape[1], 1))
    penalty[-1] = 0
    target = np.eye(classes)[y]
    rate = 1 / (1 + 0.5 * c * np.linalg.norm(design, 2) ** 2)
    w = previous = np.zeros((design.shape[1], classes))
    for k in range(steps):
        ahead = w + k / (k + 3) * (w - previous)
        logits = design @ ahead
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = c * design.T @ (p - target) + penalty * ahead
        if np.abs(gradient).max() < 1e-4 * c:
            break
        previous, w = w, ahead - rate * gradient
    return w[:-1].T @ axes, w[-1]


def adapted(learner: MetaLearner, bench: Bench, episodes: Episodes, *, at_once: int = 1) -> np.ndarray:
    """Accuracy (episodes,) of a learner that adapts by steps, after the trained number of them.

    `at_once` episodes are stacked; fewer are padded less, which on a CPU counts for more.
    """
    widen_head(learner, episodes.way)
    cached = prefix_of(learner.model)  # type: ignore[arg-type]
    labels = [mx.array(episodes.labels(part).astype(np.int32)) for part in ("support", "query")]
    steps, accuracies = learner.num_inner_steps, []
    for start in range(0, len(episodes.support), at_once):
        stacks = []
        for rows, y in zip((episodes.support, episodes.query), labels, strict=True):
            ids = bench.data.ids[rows[start : start + at_once]]
            x = cached(mx.array(ids[..., : used_length(ids, bench.data.pad_id)]))
            stacks += [x, mx.broadcast_to(y, (len(ids), *y.shape))]
        accuracies.append(learner.evaluate_per_task([EpisodeStack(*stacks)], None, (steps,))[f"step_{steps}_acc"])
    return np.concatenate(accuracies)

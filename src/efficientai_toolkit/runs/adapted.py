"""One user's model: a meta-trained checkpoint adapted to their own examples, kept in a folder of kilobytes.

The folder holds `adapted.json` (labels, the base model, the configuration that rebuilds it) and `adapted.npz` (the
learner's fast state: adapter and head, or prototypes). The base model's weights are not in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters.fixed import fixed_arrays
from ..checkpoint import read_npz, write_npz
from ..config import MetaLearningConfig
from ..errors import CheckpointError, DataError, DataNotFoundError, ModelError
from ..files import write_json
from ..learners.learner import apply_fast
from ..nn.functional import trainable, update
from ..nn.statistics import by_module, by_path, given, recorded
from ..nn.trees import check_fit, flatten
from .adapted_folder import ABOUT, ARRAYS, CURVE, FORMAT, FORMAT_VERSION, check_output, read_about
from .base_model import check_base, describe_base, move_base, placing, take_fixed
from .build import checkpoint_file
from .loaded import Inputs, Loaded, load_learner, structure, widen_head

if TYPE_CHECKING:
    from ..learners.base import MetaLearner

_STATISTICS = "statistics/"  # what the names of the support's begin with in a file
_BATCH = 32
_OFF_SHARE = 0.95
_FOLDS = 3  # of held-out support examples that a threshold is calibrated on


class Answer(NamedTuple):
    """What an adapted model says of one input."""

    label: str | None  # None for "none of these"
    probability: float  # of the likeliest label
    score: float  # of `scores`


class AdaptedTask:
    """A learner's fast state on one task, and the labels it tells apart.

    Args:
        base: the learner; only its structure counts, `fast` holds the rest.
        fast: what `learner.adapt` gave.
        labels: of the columns of the predictions; None for regression.
        threshold: scores below it mean "none of these"; None never says so.
        counts: examples of each label.
        statistics: of the support, by `support_statistics`: what normalises by its batch normalises by them.
        columns: names of the numbers of an input, where they have some.
    """

    def __init__(
        self,
        base: Loaded,
        fast: Any,
        labels: list[str] | None,
        threshold: float | None = None,
        counts: dict[str, int] | None = None,
        statistics: dict[str, mx.array] | None = None,
        columns: list[str] | None = None,
    ):
        self.base, self.learner, self.config, self.fast = base, base.learner, base.config, fast
        self.labels, self.threshold, self.counts = labels, threshold, counts or {}
        self.statistics, self.columns = statistics or {}, columns
        self._inputs = Inputs(self.config, base.input_shape)
        self.kind = self._inputs.kind
        self.reads_texts = self.kind == "texts"

    @property
    def model(self) -> nn.Module:
        """The model with the adapted weights in it (of a metric learner: those of its encoder)."""
        model = self.learner.model
        update(model, self.fast if self._is_weights else self.fast.get("model", {}))
        return model

    @property
    def learned(self) -> dict[str, mx.array]:
        """What a metric learner made of the examples, without its encoder's weights; empty of one that adapts weights.

        Of a prototypical network it is `prototypes` (C, d), one of each label.
        """
        if self._is_weights:
            return {}
        made = flatten({name: part for name, part in self.fast.items() if name != "model"})
        if self.labels is not None and "prototypes" in made:  # which has a row for every class there could have been
            return {"prototypes": made["prototypes"][: len(self.labels)]}
        return made

    @property
    def _is_weights(self) -> bool:
        return self.learner.learner.predict is apply_fast

    def outputs(self, inputs: Any) -> mx.array:
        """Texts or files of images (N,), or arrays (N, *input) → logits (N, labels), or targets (N, *output)."""
        _check_list(inputs, "inputs")
        if len(inputs) == 0:
            raise DataError("there are no inputs")
        problem, parts = self.learner.problem(), []
        with given(by_module(self.learner.model, self.statistics)):
            for start in range(0, len(inputs), _BATCH):
                x = self._inputs(inputs[start : start + _BATCH])
                with _reading(x, self.base, "the adapted model"):
                    parts.append(self.learner.learner.predict(problem, self.fast, x))
                    mx.eval(parts[-1])
        out = mx.concatenate(parts)
        # A metric learner keeps a column for every class that its support could have held.
        return out if self.labels is None else out[:, : len(self.labels)]

    def predict(self, inputs: Any) -> list[tuple[str | None, float]]:
        """The label and its probability of every input; None for "none of these"."""
        return [(answer.label, answer.probability) for answer in self.answers(inputs)]

    def answers(self, inputs: Any) -> list[Answer]:
        """What `predict` says of every input, with its score, which the threshold is compared with."""
        if self.labels is None:
            raise ModelError("this is a regression model, which predicts numbers, not labels; use `outputs`")
        _check_list(inputs, "inputs")
        if len(inputs) == 0:
            return []
        logits = self.outputs(inputs)
        threshold = -np.inf if self.threshold is None else self.threshold
        probabilities, fits = np.array(mx.softmax(logits, axis=-1)), scores(logits)
        best = probabilities.argmax(1)
        return [
            Answer(self.labels[i] if fits[row] >= threshold else None, float(probabilities[row, i]), float(fits[row]))
            for row, i in enumerate(best.tolist())
        ]

    def save(self, folder: str | Path) -> None:
        """Write the folder; what a former call wrote there is replaced, and a curve of its training removed.

        Raises:
            OutputError: it cannot be written, or has an `adapted.json` that is not of this toolkit.
        """
        folder = Path(folder)
        check_output(folder, ABOUT, ARRAYS)
        if (folder / ABOUT).is_file():
            (folder / CURVE).unlink(missing_ok=True)
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "labels": self.labels,
            "examples": self.counts,
            "threshold": self.threshold,
            "columns": self.columns,
            "base": {
                **describe_base(self.config, self.learner.model),
                "input_shape": list(self.base.input_shape),
                "output_dim": self.base.output_dim,
            },
            "config": {name: part for name, part in self.config.to_dict().items() if name not in ("paths", "logging")},
        }
        statistics = {_STATISTICS + name: array for name, array in self.statistics.items()}
        arrays = {**flatten(self.fast), **fixed_arrays(self.learner.model), **statistics}
        write_npz(folder / ARRAYS, arrays, {"labels": self.labels})
        write_json(folder / ABOUT, about)

    @classmethod
    def load(cls, folder: str | Path, *, source: str | None = None) -> AdaptedTask:
        """Read what `save` wrote.

        Args:
            folder: it.
            source: where the base model is on this machine, where it differs from where it was.

        Raises:
            DataNotFoundError, CheckpointError: the folder is not one, is damaged, or is for another base model.
        """
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise DataNotFoundError(f"{folder} has no {ABOUT}: not a folder that `adapt` wrote")
        about = read_about(folder / ABOUT)
        config = MetaLearningConfig.from_dict(about["config"], where=str(folder / ABOUT))
        move_base(config, source)
        arrays, header = read_npz(folder / ARRAYS)
        if header.get("labels") != about["labels"]:
            raise CheckpointError(f"{folder}: {ABOUT} and {ARRAYS} do not belong together; adapt again")
        shape, outputs = tuple(about["base"]["input_shape"]), about["base"]["output_dim"]
        with placing(about["base"], config, folder):
            learner = structure(config, shape, outputs)
        base = Loaded(learner, config, shape, outputs, about["labels"] is not None)
        check_base(about["base"], config, learner.model, folder)
        statistics = {name: array for name, array in arrays.items() if name.startswith(_STATISTICS)}
        arrays = {name: array for name, array in arrays.items() if name not in statistics}
        fast = _nested(take_fixed(learner.model, arrays, folder))
        own = trainable(learner.model)
        weights = fast if learner.learner.predict is apply_fast else fast.get("model", {})
        resized = [name for name in weights if name in own and weights[name].shape[1:] == own[name].shape[1:]]
        expected = {name: weights[name] if name in resized and name.startswith("head.") else own[name] for name in own}
        check_fit(weights, expected, repr(config.model.source) if config.model.reads_texts else "this model")
        statistics = {name.removeprefix(_STATISTICS): array for name, array in statistics.items()}
        return cls(base, fast, about["labels"], about["threshold"], about["examples"], statistics, about["columns"])


def adapt_checkpoint(
    checkpoint: str | Path,
    inputs: Sequence[Any] | np.ndarray,
    labels: Sequence[str],
    *,
    num_steps: int | None = None,
    background: Sequence[Any] | None = None,
    source: str | None = None,
    columns: list[str] | None = None,
) -> AdaptedTask:
    """Adapt what `train` saved to a user's own examples.

    Args:
        checkpoint: a file or a run folder.
        inputs: texts, numbers (N, *input), or images: their files, or (N, H, W, C) in [0, 1] or of whole levels to 255.
        labels: of each, any strings, as many different ones as there are, each with at least one example.
        num_steps: inner steps; default: as trained.
        background: inputs that belong to none of the labels; from their scores a "none of these" threshold is set.
        source: where the base model is on this machine, where it differs from where it was.
        columns: names of the numbers of an input, kept for those who will ask.

    Raises:
        DataError: there are no examples, or not as many labels.
        ModelError: the examples cannot be learned by this model.
        CheckpointError: the checkpoint is damaged, or is for another base model.
    """
    _check_list(inputs, "inputs")
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise DataError(f"got {len(inputs)} inputs and {len(labels)} labels; expected as many of each, one at least")
    if background is not None:
        _check_list(background, "background")
        if len(background) == 0:
            raise DataError("the background is empty; expected inputs that fit no label, or None")
    path = checkpoint_file(checkpoint)
    base = load_learner(path, source=source)
    learner = base.learner
    x = Inputs(base.config, base.input_shape)(inputs)
    with _reading(x, base, f"the model of {path}"):
        mx.eval(learner.problem().apply(learner.meta["model"], x[:1]))
    if not base.classification:
        if background is not None:
            raise ModelError(f"{path} is a regression model: it has no labels, so nothing can be none of them")
        fast = _adapt(learner, x, targets(labels), num_steps)
        return AdaptedTask(base, fast, None, statistics=support_statistics(learner, fast, x), columns=columns)
    names = list(dict.fromkeys(labels))
    y = np.array([names.index(label) for label in labels], np.int32)
    widened = widen_head(learner, len(names))
    fast = _adapt(learner, x, mx.array(y), num_steps)
    if widened and len(names) > 1 and _alike(learner, fast):
        raise ModelError(
            f"{path} was trained for {base.output_dim} classes, and the examples have {len(names)}: a new head starts "
            f"alike for all of them, and the inner steps of {base.config.algorithm!r} "
            f"({learner.num_inner_steps if num_steps is None else num_steps} were taken) have left it so; give "
            f"{base.output_dim} labels, or train with algorithm protonet"
        )
    counts = {name: int((y == i).sum()) for i, name in enumerate(names)}
    adapted = AdaptedTask(base, fast, names, None, counts, support_statistics(learner, fast, x), columns)
    if background is not None:
        adapted.threshold = calibrate(adapted, x, y, background, num_steps)
    return adapted


def support_statistics(learner: MetaLearner, fast: Any, x: mx.array) -> dict[str, mx.array]:
    """By what the adapted model normalises its support `x`; nothing, where nothing in it normalises by its batch."""
    with recorded() as statistics:
        learner.learner.predict(learner.problem(), fast, x)
    found = by_path(learner.model, statistics)
    mx.eval(found)
    return found


def scores(logits: mx.array) -> np.ndarray:
    """(N, C) logits → (N,) how well anything fits: log Σ exp, the energy score (Liu et al. 2020, arXiv:2010.03759)."""
    return np.array(mx.logsumexp(logits, axis=-1))


def calibrate(
    adapted: AdaptedTask, x: mx.array, y: np.ndarray, background: Sequence[Any], num_steps: int | None = None
) -> float:
    """The threshold on `scores` with the best balanced accuracy between examples held out and the background.

    Up to three times one example of every class that has two is held out and scored by a model adapted to the rest.
    Where no class has two, 19 of 20 background inputs are to be told off.
    """
    learner, problem = adapted.learner, adapted.learner.problem()
    off = scores(adapted.outputs(background))
    places = np.array([int((y[:i] == label).sum()) for i, label in enumerate(y)])
    counts = np.bincount(y)
    known: list[np.ndarray] = []
    for fold in range(_FOLDS):
        out = (places == fold) & (counts[y] > 1)
        if not out.any():
            break
        rest, held = mx.array(np.flatnonzero(~out)), mx.array(np.flatnonzero(out))
        fast = _adapt(learner, x[rest], mx.array(y[~out]), num_steps)
        with given(by_module(learner.model, support_statistics(learner, fast, x[rest]))):
            logits = learner.learner.predict(problem, fast, x[held])[:, : len(counts)]
        known.append(scores(logits))
    return threshold_between(np.concatenate(known), off) if known else float(np.quantile(off, _OFF_SHARE))


def _check_list(inputs: Any, name: str) -> None:
    if isinstance(inputs, (str, bytes, Path)):
        raise DataError(f"{name} is {inputs!r:.60}, one alone; expected a list of them")


def threshold_between(on: np.ndarray, off: np.ndarray) -> float:
    """The threshold with the best balanced accuracy between scores of known inputs and of the background."""
    # Between neighbouring scores, so that a threshold is no example's own score.
    every = np.unique(np.concatenate([on, off]))
    candidates = (every[1:] + every[:-1]) / 2 if len(every) > 1 else every
    balanced = (on >= candidates[:, None]).mean(1) + (off < candidates[:, None]).mean(1)
    return float(candidates[int(np.argmax(balanced))])


@contextlib.contextmanager
def _reading(x: mx.array, base: Loaded, name: str) -> Iterator[None]:
    """Within it, inputs `x` of a shape that the model `name` cannot take are said to be so."""
    try:
        yield
    except ValueError as error:
        shape = tuple(x.shape[1:])
        if isinstance(error, ModelError) or shape == tuple(base.input_shape):
            raise
        raise DataError(
            f"{name} cannot take inputs of shape {shape}; it was trained on {tuple(base.input_shape)}"
        ) from error


def _adapt(learner: MetaLearner, x: mx.array, y: mx.array, num_steps: int | None) -> Any:
    fast = learner.learner.adapt(
        learner.problem(),
        learner.meta,
        x,
        y,
        key=mx.random.key(learner.seed) if learner.adapts_by_steps else None,
        num_steps=learner.num_inner_steps if num_steps is None else num_steps,
    )
    mx.eval(fast)
    return fast


def _alike(learner: MetaLearner, fast: Any) -> bool:
    """Whether the adapted head is the same for all classes, and so tells none from another."""
    return all(mx.all(fast[path] == fast[path][:1]).item() for path in learner.problem().head_paths)


def targets(labels: Sequence[str]) -> mx.array:
    """(N, 1) the numbers that a regression's labels say; a `DataError` where one is no finite number."""
    with np.errstate(over="ignore"):  # to infinity, which is refused
        values = np.array([[_number(label)] for label in labels], np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"this is a regression model, and the label of example {bad[0] + 1} is {labels[bad[0]]!r}; "
            "expected a finite number, of at most ±3.4e38 (float32)"
        )
    return mx.array(values)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _nested(arrays: dict[str, mx.array]) -> Any:
    """The inverse of `flatten` for trees of mappings."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = array
    return tree

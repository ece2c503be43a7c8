"""A trained learner from its checkpoint alone, without the tasks it was trained on, and inputs as it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoint import read_header
from ..config import MetaLearningConfig
from ..errors import CheckpointError, ModelError
from ..learners.learner import apply_fast
from ..nn.functional import update
from ..tasks import family
from ..tasks.base import TaskConfig
from ..tasks.images import ImageFamily
from .base_model import load_checkpoint, move_base, placing
from .build import build_learner, build_model, restore

if TYPE_CHECKING:
    from ..learners.base import MetaLearner


class Loaded(NamedTuple):
    """A meta-trained learner without the tasks that it was trained on."""

    learner: MetaLearner
    config: MetaLearningConfig
    input_shape: tuple[int, ...]
    output_dim: int
    classification: bool = True


class Inputs:
    """Texts, images (their files, or arrays) or numbers, which stay as they are, as what the configured model takes.

    Args:
        config: of the model.
        input_shape: (H, W, C) that files of images are resized to.
    """

    def __init__(self, config: MetaLearningConfig, input_shape: tuple[int, ...] = ()):
        self._encode: Any = None
        self._config, self._shape = config, input_shape
        self.kind = kind_of_inputs(config)

    def __call__(self, inputs: Any) -> mx.array:
        if self.kind == "images":
            from ..tasks.image_examples import image_arrays

            return mx.array(image_arrays(inputs, self._config.task_distribution.task_families[0], self._shape))
        if self.kind == "numbers":
            return mx.array(np.asarray(inputs, np.float32))
        from ..pretrained import load_tokenizer
        from ..tasks.text import BUCKETS

        if self._encode is None:
            params = self._config.task_distribution.task_params
            source = params.get("tokenizer", self._config.model.source)
            self._encode = load_tokenizer(source, max_length=_max_length(self._config))
        ids = self._encode(list(inputs))
        width = next((b for b in BUCKETS if b >= ids.shape[1]), ids.shape[1])
        return mx.pad(ids, [(0, 0), (0, width - ids.shape[1])], constant_values=self._encode.pad_id)


def load_learner(path: Path, *, source: str | None = None) -> Loaded:
    """The learner of a checkpoint, over the base model at `source` where that is given.

    For texts no data set is read, and for images none but to learn their size: what the tasks were does not matter to a
    new one.
    """
    header, config = read_header(path), stored_config(path)
    move_base(config, source)
    kind = kind_of_inputs(config)
    if kind == "numbers":
        built = restore(path, config=config)
        tasks = built.splits.train
        outputs = max(split.output_dim for split in built.splits)
        return Loaded(built.learner, config, tasks.input_shape, outputs, tasks.is_classification)
    section = config.task_distribution
    shape = (_max_length(config),) if kind == "texts" else _image_shape(config)
    outputs = max(section.n_way, section.task_params.get("train_n_way", 0))
    with placing(header.get("base"), config, path):
        learner = structure(config, shape, outputs)
    load_checkpoint(learner, config, path)
    return Loaded(learner, config, shape, outputs)


def stored_config(path: Path) -> MetaLearningConfig:
    """The configuration in a checkpoint of `train`."""
    stored = read_header(path).get("config")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds no configuration (it was made by `save`, not by `train`)")
    return MetaLearningConfig.from_dict(stored, where=str(path))


def kind_of_inputs(config: MetaLearningConfig) -> str:
    """Whether the configured model reads "texts", "images" or "numbers"."""
    if config.model.reads_texts:
        return "texts"
    kinds = map(family, config.task_distribution.task_families)
    return "images" if all(issubclass(kind, ImageFamily) for kind in kinds) else "numbers"


def is_regression(config: MetaLearningConfig) -> bool:
    """Whether the configured tasks have numbers for labels."""
    return not family(config.task_distribution.task_families[0]).classification


def read_arrays(
    path: str | Path, kind: str, *, labelled: bool = True, columns: list[str] | None = None, regression: bool = False
) -> tuple[Any, list[str] | None]:
    """Inputs and labels of a user's file (or folder) of "images" or "numbers": `read_images` or `read_numbers`."""
    if kind == "images":
        from ..tasks.image_examples import read_images

        return read_images(path, labelled=labelled)
    from ..tasks.numbers import read_numbers

    return read_numbers(path, labelled=labelled, columns=columns, regression=regression)


def structure(config: MetaLearningConfig, input_shape: tuple[int, ...], output_dim: int) -> MetaLearner:
    """The learner over the model that `config` describes, without its tasks."""
    return build_learner(config, build_model(config, input_shape, output_dim))


def widen_head(learner: MetaLearner, count: int) -> bool:
    """Give a learner that adapts weights a head of `count` classes; whether it had another number.

    Every class then starts from the mean of those that were trained, in the head and in what the learner has for each
    of them (Meta-SGD's rates, Meta-Curvature's matrices): the inner steps tell the classes apart by their examples
    alone.

    Raises:
        ModelError: its head, or a part of it, is frozen at another number.
    """
    if learner.learner.predict is not apply_fast:
        return False
    params, head = learner.meta["model"], learner.model["head"]
    outputs = head.get("base", head).weight.shape[0]
    if outputs == count:
        return False
    own = [f"head.{name}" for name in ("weight", "bias") if name in head]
    if not own or any(path not in params for path in own):
        raise ModelError(
            f"the head of this model is frozen at {outputs} classes, and the examples have {count}; "
            "train with adapter.train_head: true, or with algorithm protonet"
        )
    for path in own:
        params[path] = _over_classes(params[path], (count, *params[path].shape[1:]))
    update(learner.model, params)
    learner.learner = learner.build(**learner.options)  # LEO's decodes as many rows as the head has
    rule, like = learner.meta["rule"], learner.learner.init(params, key=mx.random.key(learner.seed))["rule"]
    for name, array in like.items():  # only their shapes count: nothing of it is computed
        rule[name] = _over_classes(rule[name], array.shape)
    learner.rebuild()
    return True


def _over_classes(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """`array` for another number of classes: where its axes differ from `shape`, the mean over them.

    A matrix M over pairs of classes becomes o + (d − o) I, d and o the means on and off its diagonal: its mean over all
    orders of the classes. On gradients that sum to zero over the classes, as those of cross entropy do, that is the
    number d − o, however many there are.
    """
    axes = [axis for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)) if old != new]
    if not axes:
        return array
    if len(axes) == 1:
        return mx.broadcast_to(mx.mean(array, axis=axes, keepdims=True), shape)
    size, on = array.shape[0], mx.mean(mx.diag(array))
    off = (mx.sum(array) - size * on) / max(size * (size - 1), 1)
    return off + (on - off) * mx.eye(shape[0])


def _image_shape(config: MetaLearningConfig) -> tuple[int, ...]:
    """(H, W, C) of the images that the model was trained on."""
    section, data_dir = config.task_distribution, config.paths.data_dir
    name = section.task_families[0]
    images = family(name).open(None if data_dir is None else Path(data_dir).expanduser())
    assert isinstance(images, ImageFamily)
    return tuple(images.input_shape(TaskConfig("images", name, task_params=section.task_params)))


def _max_length(config: MetaLearningConfig) -> int:
    """Tokens after which texts were cut in training."""
    section = config.task_distribution
    default = max(getattr(family(name), "max_length", 0) for name in section.task_families)
    return section.task_params.get("max_length", default)

"""From a configuration to what runs: the task distributions, the model with its adapter, the learner."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..backbones import build_backbone
from ..checkpoint import read_header
from ..config import MetaLearningConfig
from ..errors import (
    AdapterError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    ToolkitError,
    did_you_mean,
)
from ..files import read_json
from ..learners import learner_class
from ..learners.base import MetaLearner
from ..optimizers import schedule
from ..tasks.build import Splits, build_splits, num_labels
from .base_model import load_checkpoint, placing
from .experiment import made_by


class Built(NamedTuple):
    config: MetaLearningConfig
    learner: MetaLearner
    splits: Splits


def build(config: MetaLearningConfig, *, drawn_from: int | None = None) -> Built:
    """What `config` describes, untrained.

    Args:
        config: the whole configuration.
        drawn_from: seed of the model's weights, where it is not that of everything else.

    Raises:
        ConfigurationError, TaskSamplingError, AdapterError, DataError: it describes nothing that can be.
    """
    if not isinstance(config, MetaLearningConfig):
        raise ConfigurationError(
            f"expected a MetaLearningConfig (from_yaml reads a file, from_dict a mapping), got {config!r}"
        )
    joint = learner_class(config.algorithm).joint  # and an unknown name is said before any data is read
    paths, seed = config.paths, config.seed
    data_dir = None if paths.data_dir is None else Path(paths.data_dir).expanduser()
    splits = build_splits(_task_section(config), data_dir=data_dir, seed=seed, joint=joint)
    if joint:  # kept with the configuration, so that the learner can be built without its tasks
        learned = {"num_base_classes": num_labels(splits.train), **config.learner}
        config = config.model_copy(update={"learner": learned})
    _check_kind(config, splits)
    if config.target_accuracy is not None and not splits.train.is_classification:
        raise ConfigurationError(
            "meta_learning.target_accuracy needs classes, and these tasks are regression; use patience"
        )
    output_dim = max(split.output_dim for split in splits)
    model = build_model(config, splits.train.input_shape, output_dim, drawn_from=drawn_from)
    learner = build_learner(config, model)
    return Built(config, learner, _cached(model, splits) if config.model.prefix_cache else splits)


def _task_section(config: MetaLearningConfig) -> Any:
    """Section `task_distribution`; texts are cut into tokens as the model was trained to read them."""
    section = config.task_distribution
    if not config.model.reads_texts:
        return section
    return section.model_copy(update={"task_params": {"tokenizer": config.model.source, **section.task_params}})


def _check_kind(config: MetaLearningConfig, splits: Splits) -> None:
    name, families = config.model.backbone, ", ".join(config.task_distribution.task_families)
    texts = splits.train.reads_texts
    own = "classification" if splits.train.is_classification else "regression"
    only = learner_class(config.algorithm).only
    if only and only != own:
        raise ConfigurationError(f"meta_learning.algorithm {config.algorithm!r} is for {only}; {families} is {own}")
    if texts and not config.model.reads_texts:
        raise ConfigurationError(f"model.backbone {name!r} cannot read the texts of {families}; use encoder")
    if config.model.reads_texts and not texts:
        raise ConfigurationError(f"model.backbone {name!r} reads texts, and {families} has none; use intents, say")


def _cached(model: nn.Module, splits: Splits) -> Splits:
    """`splits` through a cache of the frozen layers below the first adapter, where the model has some."""
    if not splits.train.reads_texts:
        return splits
    from ..backbones.frozen_prefix import Cacheable, FrozenPrefix, frozen_layers
    from ..tasks.storage import user_cache

    if not isinstance(model, Cacheable) or not frozen_layers(model):
        return splits
    prefix = FrozenPrefix(model, user_cache() / "prefix")
    return Splits(*(split.through(prefix) for split in splits))


def build_model(
    config: MetaLearningConfig, input_shape: tuple[int, ...], output_dim: int, *, drawn_from: int | None = None
) -> nn.Module:
    """The backbone and, where one is configured, its adapter (then only the adapter is trainable)."""
    seed = config.seed if drawn_from is None else drawn_from
    model = build_backbone(config.model, input_shape, output_dim, seed=seed)
    if config.adapter.method is None:
        if config.adapter.options:
            raise ConfigurationError(
                f"adapter.{next(iter(config.adapter.options))} is given, but no adapter.method to which it belongs"
            )
        return model
    from ..adapters import adapter_config, attach

    options = dict(config.adapter.options)
    head = options.pop("train_head", False)
    try:
        settings = adapter_config(config.adapter.method, **options)
        key = mx.random.key(seed)
        return attach(model, settings, config.adapter.target_modules, key=key, train_head=head)
    except AdapterError as error:
        raise AdapterError(f"section adapter: {error}") from None
    except ToolkitError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"adapter: {config.adapter.method!r} cannot be built from {config.adapter.options}: {error}"
        ) from error


def build_learner(config: MetaLearningConfig, model: nn.Module) -> MetaLearner:
    """The configured learner over `model`; what `learner:` says is checked against what the algorithm takes."""
    made = learner_class(config.algorithm)
    known = made.option_names() | {
        name: parameter.default
        for name, parameter in inspect.signature(MetaLearner.__init__).parameters.items()
        if name in ("head", "chunk", "compile")
    }
    for name in config.learner:
        if name in type(config.meta_learning).model_fields:
            raise ConfigurationError(f"learner.{name} belongs to the section meta_learning")
        if name not in known:
            raise ConfigurationError(
                f"learner.{name}: {config.algorithm!r} has no such option{did_you_mean(name, known)}"
            )
    optimizer, total = config.optimizer, config.num_meta_iterations
    rate = schedule(
        optimizer.schedule, config.outer_lr, total, warmup=optimizer.warmup_iterations, end=optimizer.final_lr
    )
    try:
        return made(
            model,
            inner_lr=config.inner_lr,
            outer_lr=rate,
            num_inner_steps=config.num_inner_steps,
            outer_optimizer=optimizer.name,
            seed=config.seed,
            gradient_clip=config.gradient_clip,
            **config.learner,
        )
    except TypeError as error:
        raise ConfigurationError(
            f"learner: {config.algorithm!r} cannot be built from {config.learner}: {error}"
        ) from error


def restore(checkpoint: str | Path, overrides: Any = (), config: MetaLearningConfig | None = None) -> Built:
    """What a checkpoint of `train` holds, rebuilt and loaded.

    Args:
        checkpoint: a file, or a run folder: then its best.
        overrides: settings that beat the checkpoint's own.
        config: in place of the checkpoint's own.
    """
    path = checkpoint_file(checkpoint)
    header = read_header(path)
    stored = header.get("config")
    if config is None:
        if not isinstance(stored, dict):
            raise CheckpointError(
                f"{path} holds no configuration (it was made by `save`, not by `train`); give --config"
            )
        config = MetaLearningConfig.from_dict(stored, overrides, where=str(path))
    # Another seed asks for other tasks: weights that are frozen as they were drawn are not in the file.
    drawn_from = MetaLearningConfig.from_dict(stored, where=str(path)).seed if isinstance(stored, dict) else None
    with placing(header.get("base"), config, path):
        built = build(config, drawn_from=drawn_from)
    load_checkpoint(built.learner, config, path)
    return built


def checkpoint_file(path: str | Path) -> Path:
    """`path`, or the best checkpoint of the run folder `path`."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [folder / "best.npz" for folder in (path / "checkpoints", path) if (folder / "best.npz").is_file()]
    if not found:
        file = path / "config.json"
        by = made_by(read_json(file)) if file.is_file() else None
        if by not in (None, "train"):
            on = (
                f"`report {path}` tells of it"
                if (path / "results.json").is_file()
                else f"`{by} --resume {path}` goes on"
            )
            raise CheckpointNotFoundError(f"{path} was made by `{by}`, which leaves no learner to load; {on}")
        raise CheckpointNotFoundError(f"{path} is a folder without checkpoints/best.npz; give a checkpoint (.npz) file")
    return found[0]

"""From the configuration's section `task_distribution` to the distributions to train, validate and test on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigurationError, did_you_mean
from . import family
from .base import Family, TaskConfig
from .classes import ClassFamily
from .distribution import TaskDistribution

if TYPE_CHECKING:
    from ..config import TaskDistributionSection


class Splits(NamedTuple):
    """Distributions that share no task; for families whose tasks share classes, no class."""

    train: TaskDistribution
    val: TaskDistribution
    test: TaskDistribution


def build_splits(
    task_config: TaskDistributionSection, *, data_dir: Path | None = None, seed: int = 0, joint: bool = False
) -> Splits:
    """The three distributions of a configuration.

    Families take turns among the tasks. Training is endless where `num_train_tasks` is null; validation and test
    are fixed tasks, and the episodes of `batch_at` are the same in every run. `joint` has the labels of training number
    all classes of the training split, below `num_labels(splits.train)`.

    Raises:
        TaskSamplingError: an unknown family, or a setting or size that it cannot have.
        ConfigurationError: a task parameter that none of the families has.
        DataNotFoundError, DataError: a data set that is not there, or is damaged.
    """
    names = task_config.task_families
    families = {name: family(name).open(data_dir) for name in names}
    params = _params_by_family(families, task_config.task_params)
    if joint and (len(names) > 1 or not isinstance(families[names[0]], ClassFamily)):
        raise ConfigurationError(
            "joint training is on the classes of one data set: task_distribution.task_families must be one image or "
            f"text family, got {', '.join(names)}"
        )

    def split(name: str, count: int | None) -> TaskDistribution:
        configs = [
            _config(f"{name}/{kind}_{i}", kind, families[kind], task_config, params[kind], name, joint)
            for i in range(len(names) if count is None else count)
            for kind in [names[i % len(names)]]
        ]
        return TaskDistribution(configs, seed, endless=count is None, families=families, stream=name)

    return Splits(
        split("train", task_config.num_train_tasks),
        split("val", task_config.num_val_tasks),
        split("test", task_config.num_test_tasks),
    )


def num_labels(tasks: TaskDistribution) -> int:
    """The labels of a distribution over classes are below it."""
    kinds = ((tasks.families[config.task_family], config) for config in tasks.configs)
    return max(
        kind.num_labels(config) if isinstance(kind, ClassFamily) else config.num_classes for kind, config in kinds
    )


_SET_HERE = {"split", "k_shot", "query_per_class", "labels"}  # by other settings, and by the algorithm
_TRAINING = ("train_n_way", "train_k_shot", "train_query_per_class")  # sizes that may differ in training


def _config(
    task_id: str, kind: str, kind_of: Family, config: TaskDistributionSection, params: dict, split: str, joint: bool
) -> TaskConfig:
    if not kind_of.way_and_shot:
        sizes = (config.num_classes, config.input_dim, config.k_shot, config.query_size)
        return TaskConfig(task_id, kind, *sizes, task_params=params)
    way, shot = config.n_way, config.k_shot
    query = config.query_per_class or max(config.query_size // way, 1)
    if split == "train":
        way, shot, query = (params.get(n, d) for n, d in zip(_TRAINING, (way, shot, query), strict=True))
    rest = {k: v for k, v in params.items() if k not in _TRAINING}
    if joint and split == "train":
        rest["labels"] = "split"
    return TaskConfig(
        task_id, kind, way, task_params={"split": split, "k_shot": shot, "query_per_class": query, **rest}
    )


def _params_by_family(families: dict[str, Family], params: dict) -> dict[str, dict]:
    """Each family's share of `task_params`; a parameter that several have goes to all of them."""
    known = {
        name: {*kind.known_params, *(_TRAINING if kind.way_and_shot else ())} - _SET_HERE
        for name, kind in families.items()
    }
    for name in params:
        if not any(name in each for each in known.values()):
            every = sorted(set().union(*known.values()))
            raise ConfigurationError(
                f"task_distribution.task_params: none of {', '.join(families)} has {name!r}{did_you_mean(name, every)}"
            )
    return {name: {k: v for k, v in params.items() if k in known[name]} for name in families}

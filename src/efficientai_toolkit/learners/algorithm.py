"""What a learner's class says of its algorithm: name, traits, options, and the algorithm as a value."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from ..errors import CheckpointError, ConfigurationError, did_you_mean
from ..settings import as_annotated
from .learner import Learner

_WITHOUT_EFFECT = ("checkpoint",)  # options that change time and memory, and no number


class Algorithm:
    """Base of `MetaLearner`; a subclass of that sets what differs, and brings its `build`."""

    algorithm: ClassVar[str]
    adapts_by_steps: ClassVar[bool] = True  # or in closed form, whatever the number of steps
    has_slots: ClassVar[bool] = False  # for the classes of a support, in place of the model's outputs
    other_labels: ClassVar[str] = ""  # what to do with labels that have none
    only: ClassVar[str] = ""  # "classification" or "regression", where it is for one of them
    options: dict[str, Any]  # those that were given; the others are the defaults of `build`
    joint: ClassVar[bool] = False  # meta-trains on labels that number all classes of the training split
    per_step_rule: ClassVar[bool] = False  # beyond the trained number of steps, the last step's rates repeat

    def build(self, **options: Any) -> Learner:
        """The algorithm as a value, from its options; keyword-only, so that their names and defaults stand once."""
        raise TypeError(f"{type(self).__name__} is not an algorithm; use a subclass")

    @classmethod
    def option_names(cls) -> dict[str, Any]:
        """Name → default of the algorithm's options."""
        parameters = inspect.signature(cls.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @classmethod
    def _checked(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the annotations of `build` have them: a YAML list where it says tuple is one."""
        known = cls.option_names()
        spellings = [p for p in inspect.signature(cls).parameters if p not in ("model", "options")]
        hints = get_type_hints(cls.build, include_extras=True) if options else {}
        checked = {}
        for name, value in options.items():
            if name not in known:
                raise ConfigurationError(f"{cls.__name__} has no option {name!r}{did_you_mean(name, spellings)}")
            try:
                checked[name] = as_annotated(value, hints[name])
            except ValueError as error:
                raise ConfigurationError(f"{cls.__name__}: option {name!r} {error}, got {value!r}") from None
        return checked

    def _check_options(self, path: str | Path, about: Mapping[str, Any]) -> None:
        """Refuse the file at `path` where its header says `about` its learner that its options were others."""
        saved, own = (
            json.loads(json.dumps({**self.option_names(), **options}))  # as in the file: a tuple is a list
            for options in (about.get("options", {}), self.options)
        )
        other = [name for name in saved if saved[name] != own.get(name) and name not in _WITHOUT_EFFECT]
        if other:
            raise CheckpointError(
                f"{path} was saved with {', '.join(f'{name} {saved[name]!r}' for name in other)}, "
                f"and this learner has {', '.join(repr(own.get(name)) for name in other)}"
            )

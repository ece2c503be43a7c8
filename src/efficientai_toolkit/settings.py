"""What a setting may be: ranges as types, and the check of a value against its annotation.

Sections of the configuration, learners, adapters and backbones annotate their settings with these types.
"""

from __future__ import annotations

import inspect
import math
from numbers import Integral, Real
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from .errors import ConfigurationError, did_you_mean


def _not_lost(rate: float) -> float:
    if rate < 1e-12:
        raise PydanticCustomError("rate", "Input should be at least 1e-12: smaller steps are lost in float32")
    return rate


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRate = Annotated[Positive, AfterValidator(_not_lost)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


def as_annotated(value: Any, annotation: Any, *, strict: bool = False) -> Any:
    """`value` as `annotation` has it: a YAML list becomes a tuple where it says so, unless `strict`.

    Raises:
        ValueError: what it should be, as the end of a sentence that begins with the setting's name.
    """
    kind = TypeAdapter(annotation, config={"allow_inf_nan": False, "arbitrary_types_allowed": True})
    try:
        found = kind.validate_python(value, strict=strict)
    except ValidationError as error:
        # "Input should be …", "Tuple should have …", "Field required"
        should = error.errors()[0]["msg"].partition("should ")[2]
        raise ValueError(f"should {should or 'have more items'}") from None
    if isinstance(value, bool) is not isinstance(found, bool):
        raise ValueError(f"should be {'a number' if isinstance(value, bool) else 'true or false'}")
    return found


def unknown_setting(made: type, name: str) -> str:
    """The sentence about a keyword argument that no constructor among `made` and its bases has."""
    known = {
        parameter.name
        for base in made.__mro__
        if base is not object and "__init__" in vars(base)
        for parameter in inspect.signature(base).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    }
    return f"{made.__name__} has no setting {name!r}{did_you_mean(name, known)}"


def check_positive(**values: float | None) -> None:
    """Every argument that is not None is a positive, finite number."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Real) and math.isfinite(value) and value > 0):
            raise ConfigurationError(f"{name} must be a positive number, got {value!r}")


def check_seed(seed: int) -> None:
    """`seed` is a whole number of 32 bits, as which it is saved."""
    if not (isinstance(seed, Integral) and 0 <= seed < 1 << 32):
        raise ConfigurationError(f"seed must be a whole number from 0 to {(1 << 32) - 1}, got {seed!r}")


def check_whole(least: int, **values: int | None) -> None:
    """Every argument that is not None is a whole number of at least `least`."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Real) and value >= least and value % 1 == 0):
            raise ConfigurationError(f"{name} must be a whole number of at least {least}, got {value!r}")

"""Every mistake that a user can make has a class here; the command line prints its sentence and exits with 2.

Each class also derives from the built-in that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NAMED = 30  # known names that a sentence lists


class ToolkitError(Exception):
    """Base of everything a user can get wrong. The message says what, where, and what would be right."""


class ConfigurationError(ToolkitError, ValueError):
    """A configuration file, flag or constructor argument that cannot be used."""


class TaskSamplingError(ToolkitError, ValueError):
    """A task or episode that cannot be drawn: an unknown task, too few examples, an impossible size."""


class DataError(ToolkitError, ValueError):
    """A data set or data file that is damaged or not what it should be."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set or data file that is not there."""


class CheckpointError(ToolkitError, ValueError):
    """A checkpoint that is damaged, foreign, or does not fit the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint that is not there."""


class AdapterError(ToolkitError, ValueError):
    """An adapter that does not fit the model, or an adapter file that cannot be read."""


class ModelError(ToolkitError, ValueError):
    """A model on which a learner cannot work (no trainable parameters, no head, wrong shapes)."""


class DeviceError(ToolkitError, RuntimeError):
    """A device that was asked for and is not there."""


class DivergenceError(ToolkitError, RuntimeError):
    """A loss that became NaN or infinite."""


class OutputError(ToolkitError, OSError):
    """A folder or file that cannot be written."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The one of `known` that was probably meant by `name`: one that contains it comes before one spelt alike."""
    text, known = str(name), sorted(known)
    holding = [one for one in known if len(text) >= 3 and text in one]
    close = difflib.get_close_matches(text, holding or known, n=1, cutoff=0.0 if holding else 0.5)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`'; did you mean 'maml'? Known: …'`: the tail of an error about an unknown name."""
    known = sorted(known)
    close = nearest(name, known)
    hint = f"; did you mean {close!r}?" if close else "."
    more = f", … ({len(known)} in all)" if len(known) > _NAMED else ""
    return f"{hint} Known: {', '.join(known[:_NAMED])}{more}"

"""Inputs that a model cannot read: MLX's refusal, deep inside a graph, as a sentence about their shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError, ToolkitError
from ..nn.functional import functional
from ..nn.head import in_order
from ..tasks.episode import EpisodeStack


@contextlib.contextmanager
def naming_inputs(model: nn.Module, stacks: Sequence[EpisodeStack]) -> Iterator[None]:
    """Within it, an error that the model raises for these inputs by itself names their shape; others stay.

    Raises:
        ModelError: `model` cannot read the inputs of one of `stacks`.
    """
    try:
        yield
    except (ValueError, IndexError) as error:
        if isinstance(error, ToolkitError):
            raise
        for stack in stacks:
            for name, x in (("support_x", stack.support_x), ("query_x", stack.query_x)):
                try:
                    functional(model)({}, x[0])  # not computed: shapes are compared before
                except (ValueError, IndexError) as fault:
                    raise ModelError(
                        f"{type(model).__name__} cannot read {name} with inputs of shape {x.shape[2:]}: "
                        f"{_wanted(model, x) or fault}"
                    ) from error
        raise


def _wanted(model: nn.Module, x: mx.array) -> str:
    """What the first layer takes, where inputs (tasks, examples, D) are to go through a linear one."""
    first = next((module for module in (model, *in_order(model)) if "weight" in module), None)
    if x.ndim != 3 or not isinstance(first, nn.Linear) or first.weight.shape[1] == x.shape[2]:
        return ""
    return f"its first layer takes ({first.weight.shape[1]},)"

"""The arrays of an adapter that it has drawn or read for itself and that no training changes (VeRA's A and B).

A file of trained arrays has them too, under names that begin with `fixed/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..nn.functional import Parameters, trainable
from ..nn.trees import check_fit
from .attach import adapter_state, slots
from .attached import adapters_of, head_state

FIXED = "fixed/"


def fixed_arrays(model: Any) -> dict[str, mx.array]:
    """Those of the model's active adapters, by their names in a file; none where it has no adapter."""
    if adapters_of(model) is None:
        return {}
    trained, active = trainable(model), {name: None for slot in slots(model).values() for name, _ in slot.active}
    return {
        FIXED + path: array
        for name in active
        for path, array in adapter_state(model, name).items()
        if path not in trained and path not in head_state(model, name)
    }


def check_fixed(model: Any, arrays: Mapping[str, mx.array], path: str | Path) -> None:
    """Refuse a file from before it had the fixed arrays, which are now drawn otherwise."""
    if (own := fixed_arrays(model)) and not own.keys() & arrays.keys():
        raise CheckpointError(
            f"{path} lacks the fixed arrays of its adapter, which this release does not draw as an earlier one did; "
            "train again"
        )


def split_fixed(model: Any, arrays: Mapping[str, mx.array]) -> tuple[Parameters, dict[str, mx.array]]:
    """A file's arrays as (the fixed ones by their paths in `model`, all others); `nn.functional.update` writes them.

    Raises:
        CheckpointError: it has some, and they are not those of this model's adapter.
    """
    given = {name: array for name, array in arrays.items() if name.startswith(FIXED)}
    if given:
        check_fit(given, fixed_arrays(model), "this model")
    own = {name.removeprefix(FIXED): array for name, array in given.items()}
    return own, {name: array for name, array in arrays.items() if name not in given}

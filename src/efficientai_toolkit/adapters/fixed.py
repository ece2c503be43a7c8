"""The arrays of an adapter that it has drawn or read for itself and that no training changes (VeRA's A and B).

A file of trained arrays has them too, under names that begin with `fixed/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..nn.functional import Parameters, trainable
from ..nn.trees import check_fit
from .attach import adapter_state
from .attached import adapters_of

FIXED = "fixed/"


def fixed_arrays(model: Any) -> dict[str, mx.array]:
    """Those of the model's adapter, by their names in a file; none where it has no adapter."""
    if adapters_of(model) is None:
        return {}
    trained = trainable(model)
    return {FIXED + path: array for path, array in adapter_state(model).items() if path not in trained}


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

"""Nested mappings of arrays as flat ones with `/` between the names (parameter paths have dots of their own)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, did_you_mean
from ..precision import widened


def flatten(tree: Any, prefix: str = "") -> dict[str, mx.array]:
    """`{"a": {"b.c": x}}` → `{"a/b.c": x}`; lists and tuples count as mappings from their indices."""
    if isinstance(tree, mx.array):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, mx.array] = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}/{name}" if prefix else str(name))
    return flat


def unflatten(arrays: Mapping[str, mx.array], like: Any, prefix: str = "") -> Any:
    """The inverse of `flatten`, with the structure of `like`."""
    if isinstance(like, mx.array):
        return arrays[prefix]
    at = f"{prefix}/{{}}" if prefix else "{}"
    if isinstance(like, dict):
        return {name: unflatten(arrays, value, at.format(name)) for name, value in like.items()}
    return type(like)(unflatten(arrays, value, at.format(number)) for number, value in enumerate(like))


def ravel(arrays: Mapping[str, mx.array]) -> tuple[mx.array, Callable[[mx.array], dict[str, mx.array]]]:
    """All of `arrays` end to end as one vector, in float32 where they have half precision, and the function that cuts
    a vector of that size up again."""
    *ends, _ = itertools.accumulate(array.size for array in arrays.values())

    def restore(vector: mx.array) -> dict[str, mx.array]:
        parts = zip(arrays.items(), mx.split(vector, ends), strict=True)
        return {name: part.reshape(array.shape).astype(array.dtype) for (name, array), part in parts}

    return mx.concatenate([widened(array).reshape(-1) for array in arrays.values()]), restore


def check_fit(given: Mapping[str, mx.array], expected: Mapping[str, mx.array], whose: str) -> None:
    """Raise one `CheckpointError` that says how the names, shapes and dtypes of `given` differ from `expected`."""
    faults = []
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    if missing:
        faults.append(
            f"{len(missing)} arrays are missing, first {missing[0]!r}{did_you_mean(missing[0], extra)}"
            if extra
            else f"{len(missing)} arrays are missing, first {missing[0]!r}"
        )
    if extra:
        faults.append(f"{len(extra)} arrays are unknown, first {extra[0]!r}")
    for name, array in expected.items():
        other = given.get(name)
        if other is not None and (tuple(other.shape) != tuple(array.shape) or other.dtype != array.dtype):
            faults.append(
                f"{name!r} is {tuple(other.shape)} {_dtype(other)}, expected {tuple(array.shape)} {_dtype(array)}"
            )
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise CheckpointError(f"the checkpoint does not fit {whose}: {shown}")


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")

"""What a model carries that has adapters: the record of them, and the heads that they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError, did_you_mean
from ..nn.functional import Parameters
from .base import AdapterConfig
from .select import walk


@dataclass
class Attached:
    """What a model carries: its adapters' configurations, and how it was before the first of them."""

    before: dict[str, set[str]]  # path -> frozen names
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)  # adapter -> path of the head that it trains
    # path of a head -> its arrays for each adapter that trains it, and as they were ("") before the first.
    kept: dict[str, dict[str, Parameters]] = field(default_factory=dict)
    held: dict[str, str | None] = field(default_factory=dict)  # path -> whose are in it now; None: a mixture


def adapters_of(model: nn.Module) -> Attached | None:
    """The record of what is attached to `model`, or `None`."""
    return model.__dict__.get("attached")


def require(model: nn.Module) -> Attached:
    attached = adapters_of(model)
    if attached is None:
        raise AdapterError("this model has no adapter; attach one first")
    return attached


def head_path(model: nn.Module, train_head: bool | str) -> str | None:
    if not train_head:
        return None
    path = "head" if train_head is True else train_head
    modules = {node.path: node.module for node in walk(model) if node.path}
    if path not in modules:
        raise AdapterError(f"train_head: no module {path!r} in this model{did_you_mean(path, modules)}")
    if any(isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for m in modules[path].modules()):
        raise AdapterError(
            f"train_head: {path!r} is quantised and cannot be trained; give it a dense layer, or an adapter"
        )
    attached = adapters_of(model)
    for other in attached.kept if attached else ():
        if path.startswith(f"{other}.") or other.startswith(f"{path}."):
            raise AdapterError(
                f"train_head: {path!r} and {other!r}, which another adapter trains, lie one in the other"
            )
    return path


def head_state(model: nn.Module, name: str) -> Parameters:
    """The arrays of the head that adapter `name` trains, by path, whether it is active or not; else none."""
    attached = require(model)
    if (path := attached.heads.get(name)) is None:
        return {}
    arrays = arrays_of(module_at(model, path)) if attached.held[path] == name else attached.kept[path][name]
    return {f"{path}.{key}": array for key, array in arrays.items()}


def write_head(model: nn.Module, name: str, arrays: Mapping[str, mx.array]) -> None:
    """Write the head that adapter `name` trains, `arrays` by their names in it."""
    attached = require(model)
    if not arrays:
        return
    path = attached.heads[name]
    attached.kept[path][name] = dict(arrays)
    if attached.held[path] == name:
        _write(module_at(model, path), arrays)


def module_at(model: nn.Module, path: str) -> Any:
    return next(node.module for node in walk(model) if node.path == path)


def arrays_of(head: nn.Module) -> Parameters:
    """The arrays of a head by path, looking through the slots that other adapters have in it."""
    return {
        f"{node.path}.{name}" if node.path else name: value
        for node in walk(head)
        for name, value in node.module.items()
        if isinstance(value, mx.array)
    }


def _write(head: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    modules = {node.path: node.module for node in walk(head)}
    for path, array in arrays.items():
        owner, _, name = path.rpartition(".")
        modules[owner][name] = array


def hold(model: nn.Module, attached: Attached, path: str, acting: Mapping[str, float]) -> None:
    """Put into the head at `path` what `acting` makes of it, and keep what was trained in it."""
    head, kept = module_at(model, path), attached.kept[path]
    holder = attached.held[path]
    if holder is not None and holder in kept:
        kept[holder] = arrays_of(head)
    alone = list(acting.values()) == [1.0]
    attached.held[path] = next(iter(acting)) if alone else None if acting else ""
    if alone or not acting:
        mixed = kept[attached.held[path] or ""]
    else:
        plain = kept[""]
        mixed = {
            key: plain[key] + sum(weight * (kept[name][key] - plain[key]) for name, weight in acting.items())
            for key in plain
        }
        mx.eval(mixed)
    _write(head, mixed)

"""Where a model's features end and its head begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError, did_you_mean
from .functional import functional, locate


def find_head(model: nn.Module, name: str | None = None) -> str:
    """Path of the head: `name`, else the attribute `head`, else the last trainable `nn.Linear`.

    Of a module that the model holds at several places it is the first, as in `trainable`.
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules or not name:
            raise ModelError(
                f"head={name!r} is not a module of {type(model).__name__}{did_you_mean(name, filter(None, modules))}"
            )
        return _path(model, modules[name])
    if isinstance(model.get("head"), nn.Module):
        return _path(model, modules["head"])
    order = {id(module): number for number, module in enumerate(in_order(model))}
    linear = [path for path, m in modules.items() if path and isinstance(m, nn.Linear) and m.trainable_parameters()]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no attribute 'head' and no trainable nn.Linear; "
            "name the head by its path, as in head='layers.2'"
        )
    return _path(model, modules[max(linear, key=lambda path: order[id(modules[path])])])


def _path(model: nn.Module, module: nn.Module) -> str:
    """Under which `trainable` lists `module`: the first that has nothing private."""
    paths = [path for path, _, _ in places(model, module)]
    return min(paths, key=lambda path: "._" in f".{path}")


def places(model: nn.Module, module: nn.Module) -> list[tuple[str, Any, Any]]:
    """(path, container, name) of every place at which `model` holds `module`, in the order of `trainable`."""
    found, seen = [], set()

    def visit(node: Any, prefix: str) -> None:
        seen.add(id(node))
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            if child is module:
                found.append((f"{prefix}{name}", node, name))
            elif isinstance(child, (dict, list)) and id(child) not in seen:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def in_order(node: Any):
    """Submodules in the order in which they were assigned (`named_modules` walks a stack, backwards)."""
    children = node.values() if isinstance(node, dict) else node
    for child in children:
        if isinstance(child, nn.Module):
            yield child
        if isinstance(child, (dict, list, tuple)):
            yield from in_order(child)


def _own_head(model: nn.Module) -> str | None:
    try:
        return find_head(model)
    except ModelError:
        return None


class _Reached(Exception):
    def __init__(self, x: mx.array):
        self.x = x


class _Tap(nn.Module):
    """Stands where the head stands and hands its input out."""

    def __call__(self, x: mx.array) -> mx.array:
        raise _Reached(x)


def features_of(model: nn.Module, head: str) -> Callable[..., mx.array]:
    """`features(params, x, *, key=None)`: the model's own `features` method, else the input of its head.

    So it is for another head than the model's own, which is what its method leads up to.
    """
    if hasattr(model, "features") and head == _own_head(model):
        return functional(model, "features")
    apply = functional(model)

    def features(params, x, *, key=None):
        container, name = locate(model, head)
        own = container[name]
        held = places(model, own)
        rest = {path: value for path, value in params.items() if not path.startswith(head + ".")}
        for _, container, name in held:
            container[name] = _Tap()
        try:
            apply(rest, x, key=key)
        except _Reached as reached:
            return reached.x
        finally:
            for _, container, name in held:
                container[name] = own
        raise ModelError(f"{type(model).__name__} never called its head {head!r}; name the head by its path")

    return features

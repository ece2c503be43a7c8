"""The one bridge from an `mlx.nn.Module` to a pure function of its parameters, and keys for random layers.

Parameters are a flat mapping from path to array, `{"layers.0.weight": …}`: a subset is a comprehension, a union
is `{**a, **b}`, and the names are those of the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Parameters = dict[str, mx.array]


def trainable(model: nn.Module) -> Parameters:
    """`model.trainable_parameters()`, flat: what a learner adapts; of a shared layer, under its first path alone."""
    first: dict[tuple[int, Any], tuple[str, Any]] = {}
    for path, value in tree_flatten(model.trainable_parameters()):
        container, name = locate(model, path)
        first.setdefault((id(container), name), (path, value))
    return dict(first.values())


def functional(model: nn.Module, method: str | None = None) -> Callable[..., Any]:
    """`apply(params, *args, key=None)`: call `model` (or its `method`) as if its weights were `params`.

    `params` may name any subset of the model's parameters; the others keep the model's own values. The model
    is left exactly as it was, also when the call raises, so the result is a pure function that every MLX
    transformation (`grad`, `vmap`, `compile`, `checkpoint`) may trace. Random layers (`Dropout` of this package)
    draw from `key`; without a key they are inactive.

    Arrays that are not in `params` (frozen weights) are constants of a trace: a compiled caller must be rebuilt
    after they change.
    """

    def apply(params: Parameters, *args: Any, key: mx.array | None = None, **kwargs: Any) -> Any:
        own: list[tuple[Any, Any, Any]] = []
        try:
            for path, value in params.items():
                container, name = locate(model, path)
                own.append((container, name, container[name]))
                container[name] = value
            with key_scope(key):
                return (getattr(model, method) if method else model)(*args, **kwargs)
        finally:
            for container, name, value in reversed(own):  # what is named twice was the model's own the first time
                container[name] = value

    return apply


def locate(model: nn.Module, path: str) -> tuple[Any, Any]:
    """The container (module, dict or list) and the name in it that `path` ends at."""
    node: Any = model
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
    return node, int(last) if isinstance(node, list) else last


def update(model: nn.Module, params: Parameters) -> None:
    """Write `params` into `model`."""
    for path, value in params.items():
        container, name = locate(model, path)
        container[name] = value


def clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares the arrays, which MLX never changes in place, and what has no copy.

    MLX's own and compiled functions have none: `mx.tanh` or `nn.relu` in a list of layers, what pooling reduces by.
    """
    memo: dict[int, Any] = {id(array): array for _, array in tree_flatten(model.parameters())}
    # Functions first: what holds some of them beside a module can then be copied.
    for part in sorted(_parts(model), key=lambda part: not callable(part)):
        try:
            copy.deepcopy(part, dict(memo))  # a trial with a memo of its own, which must not outlive it
        except TypeError:
            memo[id(part)] = part
    return copy.deepcopy(model, memo)


def _parts(model: nn.Module) -> Iterator[Any]:
    """What a module tree holds beside modules, containers and values, also as plain attributes; each once."""
    waiting, seen = [model], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, nn.Module):
            waiting += vars(node).values()
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, (list, tuple)):
            waiting += node
        elif not isinstance(node, (mx.array, bool, int, float, str, set, MethodType, type(None))):
            yield node


class _Keys:
    """A source of fresh keys: each `next()` splits the one it holds."""

    def __init__(self, key: mx.array):
        self._key = key

    def next(self) -> mx.array:
        self._key, fresh = mx.random.split(self._key)
        return fresh


_scopes: list[_Keys | None] = []


@contextlib.contextmanager
def key_scope(key: mx.array | None) -> Iterator[None]:
    """Within it, random layers draw from `key`; `None` makes them inactive."""
    _scopes.append(None if key is None else _Keys(key))
    try:
        yield
    finally:
        _scopes.pop()


def next_key() -> mx.array | None:
    """A fresh key of the innermost `key_scope`, or `None` where there is none."""
    return _scopes[-1].next() if _scopes and _scopes[-1] is not None else None

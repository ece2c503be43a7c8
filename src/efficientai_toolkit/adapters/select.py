"""Which modules of a model an adapter goes to: by path, by glob, or by kind."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from ..errors import AdapterError, nearest
from ..nn.layers import EpisodicBatchNorm
from .base import Adapted, AdapterConfig
from .quantized import is_linear

# The names that model families give the same layer (own encoders and Llama-likes, BERT, DistilBERT, mlx.nn, GPT-2 …).
NAMES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "query", "q_lin", "query_proj", "wq", "to_q"),
    "key": ("k_proj", "key", "k_lin", "key_proj", "wk", "to_k"),
    "value": ("v_proj", "value", "v_lin", "value_proj", "wv", "to_v"),
    "attention_output": ("o_proj", "out_proj", "out_lin", "wo", "to_out"),
    "feedforward_in": ("up_proj", "gate_proj", "lin1", "fc1", "linear1"),
    "feedforward_out": ("down_proj", "lin2", "fc2", "linear2"),
    "feedforward": ("feed_forward", "mlp", "ffn"),
    "word_embedding": ("word_embeddings", "embed_tokens", "wte", "tok_embeddings"),
}
SHARED = "adapter_shared"  # where, on the root, the shared parts of adapters live
_OUTPUT_LAYERS = ("lm_head", "head", "embed_out")


class Node(NamedTuple):
    path: str  # as if no adapter were attached
    module: Any  # the user's module (never a slot)
    container: Any  # module, dict or list that holds it; None for the root
    name: Any
    real: str  # path among the model's parameters as it is now


def walk(model: nn.Module) -> Iterator[Node]:
    """Every module of `model` in the order of construction, looking through adapter slots."""

    def visit(value: Any, path: str, container: Any, name: Any, real: str) -> Iterator[Node]:
        if isinstance(value, Adapted):
            value, real = value["base"], join(real, "base")
        if isinstance(value, nn.Module):
            yield Node(path, value, container, name, real)
        if isinstance(value, (nn.Module, dict, list)):
            for key in range(len(value)) if isinstance(value, list) else list(value):
                if key != SHARED:
                    yield from visit(value[key], join(path, key), value, key, join(real, key))

    def join(path: str, key: object) -> str:
        return f"{path}.{key}" if path else str(key)

    yield from visit(model, "", None, None, "")


def named(path: str, pattern: str) -> bool:
    """Whether `path` is `pattern`, ends with it at a dot, or matches it as a glob."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def is_attention(module: Any) -> bool:
    """A module with query, key and value projections among its own layers."""
    return isinstance(module, nn.Module) and all(
        any(name in module for name in NAMES[kind]) for kind in ("query", "key", "value")
    )


def _by_name(kind: str) -> Callable[[Node], bool]:
    return lambda node: any(named(node.path, name) for name in NAMES[kind])


def _linear_by_name(kind: str) -> Callable[[Node], bool]:
    return lambda node: is_linear(node.module) and any(named(node.path, name) for name in NAMES[kind])


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm, nn.BatchNorm, EpisodicBatchNorm)
KINDS: dict[str, Callable[[Node], bool]] = {
    # Every linear layer but a model's output layer, as PEFT's "all-linear".
    "linear": lambda node: is_linear(node.module) and node.path.split(".")[-1] not in _OUTPUT_LAYERS,
    "attention": lambda node: is_attention(node.module),
    "norm": lambda node: isinstance(node.module, _NORMS),
    "embedding": lambda node: isinstance(node.module, (nn.Embedding, nn.QuantizedEmbedding)),
    "bias": lambda node: "bias" in node.module,
    "feedforward": lambda node: not is_linear(node.module) and _by_name("feedforward")(node),
    "word_embedding": _by_name("word_embedding"),
    **{
        kind: _linear_by_name(kind)
        for kind in ("query", "key", "value", "attention_output", "feedforward_in", "feedforward_out")
    },
}


def select(
    model: nn.Module, config: Any, target_modules: str | Sequence[str] | None = None, *, exclude: str | None = None
) -> list[Node]:
    """The modules that `config`'s adapter would sit on.

    Args:
        target_modules: paths or their endings (`"q_proj"`), globs (`"layers.[45].*"`), kinds (`KINDS`), or `None`
            for the method's own choice.
        exclude: a path whose modules are left alone (a head that is trained itself).

    Raises:
        AdapterError: nothing matched, and the message lists what could; or there is nothing to match.
    """
    if not isinstance(config, AdapterConfig):
        raise AdapterError(f"an adapter's configuration is an object such as LoRAConfig(rank=8), got {config!r}")
    if target_modules is not None:
        _check_targets(target_modules)
    nodes = [
        node
        for node in walk(model)
        if config.adapter.fits(node.module)
        and not (exclude and (node.path == exclude or node.path.startswith(f"{exclude}.")))
    ]
    given = (target_modules,) if isinstance(target_modules, str) else target_modules
    alternatives = config.targets if given is None else (tuple(given),)
    for patterns in alternatives:
        tests = [_test(pattern, nodes, given is not None) for pattern in patterns]
        if found := [node for node in nodes if any(test(node) for test in tests)]:
            return found
    raise AdapterError(_nothing_matched(config, alternatives, nodes))


def _check_targets(target_modules: object) -> None:
    listed = [target_modules] if isinstance(target_modules, str) else target_modules
    if not (isinstance(listed, Sequence) and listed and all(isinstance(t, str) and t for t in listed)):
        raise AdapterError(
            f"target_modules is {target_modules!r}; expected paths, globs or kinds such as ['query', 'value'], "
            "or none for the method's own"
        )


def _test(pattern: str, nodes: Sequence[Node], given: bool) -> Callable[[Node], bool]:
    """What `pattern` means: a path, else a kind, else the end of paths; that, too, where a given kind has no module."""
    if any(node.path == pattern for node in nodes):  # that module only, not others whose path ends so
        return lambda node: node.path == pattern
    kind = KINDS.get(pattern)
    if kind and (not given or any(kind(node) for node in nodes)):
        return kind
    return lambda node: named(node.path, pattern)


def _nothing_matched(config: Any, alternatives: Sequence[Sequence[str]], nodes: Sequence[Node]) -> str:
    wanted = " or ".join(", ".join(map(repr, patterns)) for patterns in alternatives)
    start = f"{type(config).__name__}: no module matches {wanted}"
    if not nodes:
        return f"{start}; this model has no module that can take it ({config.adapter.wants} is needed)."
    paths = [node.path or "(the model itself)" for node in nodes]
    shown = ", ".join(paths[:12]) + (f", … ({len(paths)} in all)" if len(paths) > 12 else "")
    kinds = [kind for kind, test in KINDS.items() if any(test(node) for node in nodes)]
    meant = _meant(alternatives[-1][0], paths, kinds) if len(alternatives) == 1 else None
    hint = f"; did you mean {meant!r}?" if meant else "."
    return f"{start}{hint} It could go to: {shown}; or by kind: {', '.join(kinds)}."


def _meant(pattern: str, paths: Sequence[str], kinds: Sequence[str]) -> str | None:
    """The path, ending, kind or glob that `pattern` was probably meant to be."""
    if not any(sign in pattern for sign in "*?["):
        return nearest(pattern, {*(path.split(".")[-1] for path in paths), *kinds, *paths})
    names = {name for path in paths for name in path.split(".")}
    parts = [part if any(sign in part for sign in "*?[") else nearest(part, names) for part in pattern.split(".")]
    glob = ".".join(part or "*" for part in parts)
    return glob if any(named(path, glob) for path in paths) else None

"""Configuration files: YAML as a mapping, with the line on which each key stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigurationError

Keys = tuple[Any, ...]


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without PyYAML's surprise that `1e-3` is a string, and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen[key.value if isinstance(key, yaml.ScalarNode) else id(key)] = True
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
# What PyYAML lets through of a hostile file, besides its own errors.
BROKEN = (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, IndexError, KeyError)
_MAX_BYTES = 1 << 20


def load_text(text: str) -> tuple[Any, yaml.Node | None]:
    """(the one document in `text`, its node tree)."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[Keys, int]]:
    """The mapping in the YAML file `path`, and the line on which each key stands."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigurationError(f"{path} is larger than a configuration can be ({_MAX_BYTES >> 20} MiB)")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigurationError(f"there is no configuration file at {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise ConfigurationError(f"{path} is empty; expected sections such as `meta_learning:`")
    try:
        data, node = load_text(text)
    except BROKEN as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{path}{line}: not valid YAML ({problem(error)})") from error
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"{path} holds {'nothing' if data is None else kind_of(data)}; expected sections such as `meta_learning:`"
        )
    lines: dict[Keys, int] = {}
    _number(node, (), lines, set())
    return data, lines


def _number(node: Any, keys: Keys, lines: dict[Keys, int], seen: set[int]) -> None:
    """Note the line of every key and list entry; a node that aliases repeat is walked once."""
    lines.setdefault(keys, node.start_mark.line + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[(*keys, key.value)] = key.start_mark.line + 1
                _number(value, (*keys, key.value), lines, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _number(value, (*keys, index), lines, seen)


def nearest_line(lines: Mapping[Keys, int], keys: Keys) -> int:
    """The line of `keys`, or of the nearest above it that the file has."""
    return next((lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in lines), 1)


def problem(error: Exception) -> str:
    """What PyYAML found wrong, on one line."""
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())[:160]


def kind_of(value: Any) -> str:
    """`value`'s type in the words of YAML."""
    return {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}.get(
        type(value), f"a {type(value).__name__}"
    )

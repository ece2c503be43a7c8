"""Write docs/api.md from the docstrings of the public names: `uv run python docs/build_api.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import efficientai_toolkit as package
from efficientai_toolkit import _NAMES

HEAD = """# API

Every name below can be imported from `efficientai_toolkit`. Written by `docs/build_api.py` from the docstrings, which
`help(NAME)` shows whole (arguments with shapes, what is raised, the paper, what differs from it).
"""


def summary(value: object) -> str:
    text = inspect.getdoc(value) or ""
    first = re.split(r"\n\s*\n", text)[0]
    return " ".join(first.split()).replace("|", "\\|")


def signature(name: str, value: object) -> str:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return name
    if hasattr(value, "model_fields"):  # a pydantic model: its sections
        return f"{name}({', '.join(f'{field}=…' for field in value.model_fields)})"  # type: ignore[attr-defined]
    try:
        call = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name
    bare = [p.replace(annotation=inspect.Parameter.empty, default=_shown(p.default)) for p in call.parameters.values()]
    return name + str(call.replace(parameters=bare, return_annotation=inspect.Signature.empty))


class _Name:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _shown(default: object) -> object:
    """Functions and modules by name: an address would differ from run to run."""
    named = default is not inspect.Parameter.empty and callable(default) and hasattr(default, "__name__")
    return _Name(default.__name__) if named else default  # type: ignore[attr-defined]


def methods(value: type) -> list[tuple[str, object]]:
    return [
        (name, member)
        for name, member in vars(value).items()
        if not name.startswith("_")
        and name != "build"
        and (inspect.isfunction(member) or isinstance(member, (classmethod, property)))
    ]


def build() -> str:
    lines = [HEAD]
    for module, names in _NAMES.items():
        lines.append(f"## `{module.removeprefix('.')}`\n")
        for name in names:
            value = getattr(package, name)
            lines.append(f"* **`{signature(name, value)}`** — {summary(value)}")
            if inspect.isclass(value) and not issubclass(value, BaseException):
                for method, member in methods(value):
                    function = getattr(member, "__func__", getattr(member, "fget", member))
                    if inspect.getdoc(function):
                        call = method if isinstance(member, property) else signature(method, function)
                        call = call.replace("(self, ", "(").replace("(self)", "()").replace("(cls, ", "(")
                        lines.append(f"  * `{call}` — {summary(function)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(build(), encoding="utf-8")

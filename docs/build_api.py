"""Write what is made from the table of public names: `uv run python docs/build_api.py`.

docs/api.md has their docstrings, `__init__.pyi` has them for type checkers and editors, to whom names that are loaded
when they are first asked for would all be `Any`.
"""

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
    """Its own and, below them, those of this package's bases that have no entry of their own."""
    public = {getattr(package, name) for names in _NAMES.values() for name in names} - {value}
    found: dict[str, object] = {}
    for base in value.__mro__:
        if base in public:
            break
        if base.__module__.startswith(package.__name__):
            found = {**vars(base), **found}
    return [
        (name, member)
        for name, member in sorted(found.items(), key=lambda item: item[0] not in vars(value))
        if not name.startswith("_")
        and name != "build"
        and (inspect.isfunction(member) or isinstance(member, (classmethod, property)))
    ]


def build() -> str:
    lines = [HEAD]
    for module, names in _NAMES.items():
        lines.append(f"## `{module.removeprefix('.')}`\n")
        shown: dict[tuple[str, object], str] = {}  # what several classes of a module inherit is described once
        for name in names:
            value = getattr(package, name)
            lines.append(f"* **`{signature(name, value)}`** — {summary(value)}")
            if inspect.isclass(value) and not issubclass(value, BaseException):
                again: dict[str, list[str]] = {}
                for method, member in methods(value):
                    function = getattr(member, "__func__", getattr(member, "fget", member))
                    if (method, member) in shown:
                        again.setdefault(shown[method, member], []).append(f"`{method}`")
                    elif inspect.getdoc(function):
                        shown[method, member] = name
                        call = method if isinstance(member, property) else signature(method, function)
                        call = (
                            call.replace("(self, ", "(")
                            .replace("(self)", "()")
                            .replace("(cls, ", "(")
                            .replace("(cls)", "()")
                        )
                        lines.append(f"  * `{call}` — {summary(function)}")
                lines += [f"  * as `{first}`: {', '.join(found)}" for first, found in again.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def build_stub() -> str:
    source = Path(package.__file__).name
    lines = [f"# Written by docs/build_api.py from `_NAMES` of `{source}`.\n"]
    lines += [f"from {module} import {name} as {name}" for module, names in _NAMES.items() for name in names]
    return "\n".join([*lines, "", "__version__: str", ""])


if __name__ == "__main__":
    Path(package.__file__).with_suffix(".pyi").write_text(build_stub(), encoding="utf-8")
    Path(__file__).with_name("api.md").write_text(build(), encoding="utf-8")

"""Tables of papers, made again. To add one: its file, with a `TABLE`, and its line in `TABLES`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    from .table import Table

TABLES = {
    "continual": "continual",
    "glue": "glue",
    "intents": "intents",
    "omniglot": "omniglot",
    "sinusoid": "sinusoid",
}


def load_table(name: str) -> Table:
    """The table of that name."""
    if name not in TABLES:
        raise ConfigurationError(f"unknown table {name!r}{did_you_mean(name, TABLES)}")
    return import_module(f".{TABLES[name]}", __name__).TABLE

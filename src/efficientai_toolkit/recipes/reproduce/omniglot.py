"""Few-shot classification of characters on Omniglot's standard split."""

from __future__ import annotations

from .table import Table

TABLE = Table(name="omniglot", title="Omniglot", about="", base={}, evaluation={}, rows=(), percent=True)

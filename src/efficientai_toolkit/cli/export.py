"""`export`: an adapter as another library's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapted = Annotated[Path, typer.Option("--adapter", help="A folder that `adapt` wrote, a checkpoint or a run folder.")]
Base = Annotated[str | None, typer.Option("--base", help="The base model, where it has moved.")]
Format = Annotated[str, typer.Option("--format", help="peft (Hugging Face) or mlx-lm.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]


def export(adapter: Adapted, output: Folder, format: Format = "peft", base: Base = None) -> None:
    """Write an adapter as Hugging Face PEFT or mlx-lm reads it."""
    from ..runs.exchange import export_adapter

    written = export_adapter(adapter, format, output, source=base)
    files = ", ".join(sorted(file.name for file in written.iterdir()))
    print(f"{format} adapter: {written} ({files})")

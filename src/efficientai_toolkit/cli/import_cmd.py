"""`import`: another library's adapter as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .export import Format


def import_(
    input: Annotated[Path, typer.Option("--input", "-i", help="Adapter folder of the other library.")],
    base: Annotated[str, typer.Option("--base", help="Its base model: a folder, a package or a hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint (.npz) to write.")],
    format: Format = "peft",
) -> None:
    """Read an adapter of Hugging Face PEFT or mlx-lm into a checkpoint that `adapt` can start from."""
    from ..runs.exchange import import_adapter
    from .shown import command

    read = import_adapter(input, format, base, output)
    print(f"{read['method']}, {read['parameters']:,} parameters: {output}")
    print(f"Use it: {command('adapt', checkpoint=output, support='my_examples.csv', output='mine')}")

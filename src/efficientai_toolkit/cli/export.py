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
    from ..runs.exchange import export_adapter, loading

    written = export_adapter(adapter, format, output, source=base)
    files = ", ".join(sorted(file.name for file in written.iterdir()))
    print(f"{format} adapter: {written} ({files})")
    say_learned(written)
    if lines := loading(written, format):
        print(f"Load it in Python:\n{lines}")


def say_learned(folder: Path) -> None:
    """What of a folder the library that it is for does not read."""
    from ..files import read_json
    from ..runs.exchange import HEAD, LABELS, LEARNED

    if not (folder / LABELS).is_file():
        return
    about = read_json(folder / LABELS)
    if (folder / LEARNED).is_file():
        kept, what = LEARNED, f"The weights are the checkpoint's own. What {about['algorithm']} learned of your"
    else:
        kept, what = HEAD, "The head over your"
    print(f"{what} {len(about['labels'])} labels is in {LABELS} and {kept}, which no other library reads.")

"""Options that several commands share, each stated once, and what they become."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config import MetaLearningConfig

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; left out: the embedded default.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one setting (repeatable).")
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of everything random (default: the configuration's, else 0).")
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Parent of one folder a data set; else $EFFICIENTAI_DATA_DIR, else the cache."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Parent of run folders (default: experiments).")]
Device = Annotated[str | None, typer.Option("--device", metavar="gpu|cpu", help="Where to compute.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (of a longer job: as its last line).")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="A checkpoint (.npz), or a run folder: its best.")]


def overrides(sets: Iterable[str] | None, **flags: tuple[str, Any]) -> list:
    """`--set` texts, then flags: `overrides(sets, iterations=("meta_learning.num_meta_iterations", n))`.

    A flag that was not given (None) overrides nothing.
    """
    from ..config import Override

    found = [Override.parse(text) for text in sets or ()]
    for flag, (key, value) in flags.items():
        if value is not None:
            value = str(value) if isinstance(value, Path) else value
            found.append(Override(key, value, f"--{flag.replace('_', '-')} {value}"))
    return found


def load_config(path: Path | None, found: Iterable[Any] = ()) -> MetaLearningConfig:
    """Flag beats file beats default."""
    from ..config import MetaLearningConfig

    return MetaLearningConfig.from_dict({}, found) if path is None else MetaLearningConfig.from_yaml(path, found)


def echo_json(value: Any) -> None:
    """One line of JSON on standard output."""
    import json

    print(json.dumps(value, allow_nan=False), flush=True)

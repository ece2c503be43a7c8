"""The folder that `adapt` and `finetune` write: the names in it, whose it is, and what its description must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import read_header
from ..errors import CheckpointError, DataError, OutputError
from ..files import check_folder, read_json

FORMAT, FORMAT_VERSION = "efficientai-toolkit adapted model", 1
ABOUT, ARRAYS = "adapted.json", "adapted.npz"
CURVE, FIGURE = "curve.json", "curve.png"  # what `finetune` tells of a training, beside them
# What `adapted.json` must hold, and the types of each.
_PARTS: dict[str, tuple[type, ...]] = {
    "labels": (list, type(None)),
    "examples": (dict,),
    "threshold": (int, float, type(None)),
    "columns": (list, type(None)),
    "base": (dict,),
    "config": (dict,),
}


def check_output(folder: str | Path, *names: str) -> None:
    """See that `folder` can be written, and that no file of the user's own is under one of `names`.

    A folder that `adapt` or `finetune` wrote is theirs, whatever is in it.

    Raises:
        OutputError: it cannot, or one is.
    """
    check_folder(folder)
    folder = Path(folder)
    marks = {ABOUT: {"format": FORMAT}, CURVE: {"data": ..., "curve": ...}, ARRAYS: {"labels": ...}}
    if any(_holds(folder / name, entries) for name, entries in marks.items()):
        return
    own = next((folder / name for name in names if (folder / name).exists()), None)
    if own is not None:
        raise OutputError(
            f"{own} is a file of your own, which would be overwritten, or damaged; remove it or name another folder"
        )


def _holds(file: Path, entries: dict[str, Any]) -> bool:
    """Whether `file`, JSON or a header of arrays, has these entries, of any value where that is `...`."""
    try:
        about = read_header(file) if file.suffix == ".npz" else read_json(file)
    except (CheckpointError, DataError):
        return False
    return isinstance(about, dict) and all(
        name in about and value in (..., about[name]) for name, value in entries.items()
    )


def read_about(file: Path) -> dict[str, Any]:
    """What `adapted.json` says, with all of its parts there."""
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is of another format; expected one that `adapt` wrote")
    if about.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has version {about.get('format_version')!r}; this release reads {FORMAT_VERSION}"
        )
    about.setdefault("columns", None)  # older files have no names
    bad = [name for name, types in _PARTS.items() if name not in about or not isinstance(about[name], types)]
    if not bad:
        sizes = {"input_shape": list, "output_dim": int}
        bad = [f"base.{name}" for name, kind in sizes.items() if not isinstance(about["base"].get(name), kind)]
    if bad:
        raise CheckpointError(f"{file} is damaged: {', '.join(bad)} missing or of the wrong type; adapt again")
    return about

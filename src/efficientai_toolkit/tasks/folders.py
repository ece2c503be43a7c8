"""Trees of folders, one a class, as a user's own images and texts come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import DataError

Classes = dict[str, list[Path]]  # name → its files
SPLITS = ("train", "val", "test")


def class_folders(root: Path, classes_in: Callable[[Path], Classes]) -> dict[str, Classes]:
    """{split: its classes} where `root` holds the folders `train/`, `val/` and `test/`; else {"": all classes}.

    Args:
        root: the tree.
        classes_in: reads the folders of one folder.

    Raises:
        DataError: a class is in two splits, as where examples are split and not classes.
    """
    if not all((root / split).is_dir() for split in SPLITS):
        return {"": classes_in(root)}
    tree = {split: classes_in(root / split) for split in SPLITS}
    first: dict[str, str] = {}
    for split, classes in tree.items():
        for name in classes:
            if name in first:
                raise DataError(
                    f"{root}: class {name!r} is in {first[name]}/ and in {split}/, and few-shot learning is measured "
                    f"on classes that were not trained on; put each class, with all its files, into one of "
                    f"{', '.join(f'{each}/' for each in SPLITS)}, or all classes into {root} without these folders"
                )
            first[name] = split
    return tree


def visible(folder: Path) -> list[Path]:
    """What is in `folder`, in order, but for what systems and tools hide in it (`._0.png`, `.ipynb_checkpoints/`)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))

"""A user's own images for a model that was trained on images: their files, or an `.npz` with `x` and `y`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError
from . import family as family_of
from .folders import visible
from .image_folder import SUFFIXES, classes_in, decode_files
from .labelled import fail, label_fault
from .numbers import read_numbers


def read_images(path: str | Path, *, labelled: bool = True) -> tuple[Sequence[Path] | np.ndarray, list[str] | None]:
    """(files, or x (N, …) of an `.npz`; labels): what is in `path`, images not decoded yet.

    Args:
        path: a folder with a folder of images for each label, or an `.npz` of `x` and `y`; where no labels are needed,
            also a folder of images, taken by name, or one image.
        labelled: labels are needed.

    Raises:
        DataError: there are none, or not of two labels, or a label cannot be one.
    """
    path = Path(path)
    if path.is_dir():
        files = _images(path)
        if files and (folder := next((f for f in visible(path) if f.is_dir() and _images(f)), None)):
            raise DataError(f"{path} holds images ({files[0].name}) beside folders of images ({folder.name}); give one")
        return (files, None) if files and not labelled else _by_label(path, labelled)
    if path.suffix.lower() in SUFFIXES and path.is_file() and not labelled:
        return [path], None
    if path.suffix == ".npz":
        x, labels = read_numbers(path, labelled=labelled)
        _check_range(x, str(path))
        if x.dtype.kind != "f" and x.max() == 1:
            raise DataError(
                f"{path}: x holds whole numbers, levels of 0 to 255, and none is above 1; save 0 to 1 as float"
            )
        return x, labels
    if not path.exists():
        raise DataNotFoundError(f"there is no file or folder at {path}")
    single = "" if labelled else "; a folder of images; one image (.png, .jpg, …)"
    raise DataError(
        f"{path}: images come as a folder with a folder of them for each label; as .npz with x and y{single}"
    )


def image_arrays(inputs: Sequence[str | Path] | np.ndarray, family: str, shape: tuple[int, ...]) -> np.ndarray:
    """Files, or arrays (N, H, W, C), as `family` gives images to a model: (N, H, W, C) float32 in [0, 1].

    Whole numbers are levels of 0 to 255; files are decoded to `shape`, (H, W, C).

    Raises:
        DataError: a file is damaged or no image, or the numbers are far from that range.
    """
    if len(inputs) and isinstance(inputs[0], str | Path):
        images = decode_files([Path(path) for path in inputs], (shape[0], shape[1]), "L" if shape[-1] == 1 else "RGB")
        x = 255 - images if getattr(family_of(family), "ink", False) else images
    else:
        x = np.asarray(inputs)
        _check_range(x, "the images")
    return np.multiply(x, np.float32(1 / 255 if x.dtype.kind in "iu" else 1), dtype=np.float32)


def _images(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.suffix.lower() in SUFFIXES]


def _by_label(folder: Path, labelled: bool) -> tuple[list[Path], list[str]]:
    classes = classes_in(folder)
    empty = [child.name for child in visible(folder) if child.is_dir() and child.name not in classes]
    fail([f"the folder {name!r} holds no images ({', '.join(sorted(SUFFIXES))})" for name in empty], str(folder))
    fail([fault for name in classes if (fault := label_fault(name))], str(folder))
    if labelled and len(classes) < 2:
        raise DataError(f"{folder}: every example is {next(iter(classes))!r}; at least two labels are needed")
    return [path for files in classes.values() for path in files], [
        name for name, files in classes.items() for _ in files
    ]


def _check_range(x: np.ndarray, name: str) -> None:
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if x.dtype.kind in "iu" and not 0 <= low <= high <= 255:
        raise DataError(f"{name}: whole numbers from {low:g} to {high:g}; expected levels of 0 to 255")
    if x.dtype.kind == "f" and not -1 <= low <= high <= 2:  # resampling overshoots [0, 1] by less
        raise DataError(
            f"{name}: numbers from {low:.4g} to {high:.4g}, and the model was trained on images in [0, 1]; scale them, "
            "or give levels of 0 to 255 as uint8"
        )

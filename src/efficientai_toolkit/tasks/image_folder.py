"""A user's own images: one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError, TaskSamplingError
from .base import TaskConfig, where
from .folders import Classes, class_folders, visible
from .images import DECODER, ImageFamily, ImageSet, decode, shuffled
from .storage import cached

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


class ImageFolder(ImageFamily):
    """Images in a tree `CLASS/….png`, of any size and in any common format; names that begin with "." are passed over.

    The tree is the folder `image_folder/` of the data folder, or the data folder itself. Where its folders are
    `train/`, `val/` and `test/`, each holds its split's classes, none of them another's too; otherwise the classes
    are split 64 / 16 / 20 in a fixed random order.

    Settings (`task_params`), besides those of `ImageFamily`:
        image_size: height and width that images are resized to; 84.
        grayscale: one channel instead of three; false.
    """

    known_params = ImageFamily.known_params | {"image_size", "grayscale"}

    def variant(self, config: TaskConfig) -> tuple[int, str]:
        size, gray = config.task_params.get("image_size", 84), config.task_params.get("grayscale", False)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 1024:
            raise TaskSamplingError(f"{where(config)}: image_size is {size!r}; expected a whole number in [1, 1024]")
        if not isinstance(gray, bool):
            raise TaskSamplingError(f"{where(config)}: grayscale is {gray!r}; expected true or false")
        return size, "L" if gray else "RGB"

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        size, mode = self.variant(config)  # without reading the images
        return size, size, len(mode)

    def read(self, size: int = 84, mode: str = "RGB") -> ImageSet:
        root = self.root / "image_folder" if (self.root / "image_folder").is_dir() else self.root
        tree = class_folders(root, classes_in)
        names, files, splits = [], [], {}
        for split, classes in tree.items():
            splits[split] = len(names) + np.arange(len(classes))
            names += [f"{split}/{name}" if split else name for name in classes]
            files += classes.values()
        if "" in tree:
            order, a, b = shuffled(len(names), "image_folder"), round(0.64 * len(names)), round(0.8 * len(names))
            splits = {"train": order[:a], "val": order[a:b], "test": order[b:]}
        paths = [path for each in files for path in each]
        kept = cached(
            f"images-{size}-{mode}-{DECODER}", paths, lambda: {"images": decode_files(paths, (size, size), mode)}
        )
        return ImageSet(kept["images"], np.cumsum([0, *map(len, files)]), names, splits)


def classes_in(folder: Path) -> Classes:
    """The folders of `folder` that hold images, with them; all in order of their names.

    Raises:
        DataNotFoundError: there is none.
    """
    classes = {
        child.name: files
        for child in visible(folder)
        if child.is_dir() and (files := [path for path in visible(child) if path.suffix.lower() in SUFFIXES])
    }
    if not classes:
        raise DataNotFoundError(f"no images in {folder}; expected a folder for each class, with its images in it")
    return classes


def decode_files(paths: list[Path], size: tuple[int, int], mode: str) -> np.ndarray:
    """(N, *size, C) uint8, each as `decode` gives it.

    Raises:
        DataError: a file cannot be read, is damaged or no image.
    """
    images = np.empty((len(paths), *size, len(mode)), np.uint8)
    for image, path in zip(images, paths, strict=True):
        try:
            image[:] = decode(path.read_bytes(), str(path), size, mode)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    return images

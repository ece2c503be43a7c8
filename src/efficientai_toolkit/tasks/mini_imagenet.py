"""mini-ImageNet (Vinyals et al. 2016) in the split of Ravi & Larochelle (2017)."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, DataNotFoundError
from .images import DECODER, ImageFamily, ImageSet, decode
from .storage import cached
from .unpickling import plain_pickle

_SPLITS = ("train", "val", "test")
_SIZE = (84, 84)


class MiniImageNet(ImageFamily):
    """mini-ImageNet: 64 / 16 / 20 classes with 600 images each, 84 × 84 × 3.

    ImageNet gives its images to each user under terms of its own, so nothing is downloaded. The folder
    `mini-imagenet/` of the data folder holds, for each of train, val and test, one of

    * `SPLIT.csv`, the split's list (`filename,label`), and the images in `images/`, of any size;
    * `SPLIT.npz` with `images` (N, 84, 84, 3) uint8 and `labels` (N,);
    * `mini-imagenet-cache-SPLIT.pkl`, the pickle that is passed around (`image_data` and `class_dict`), read
      without running anything in it.

    Settings: those of `ImageFamily`.
    """

    pixels = 84, 84, 3

    def read(self) -> ImageSet:
        folder = self.root / "mini-imagenet"
        images, labels, names, splits = [], [], [], {}
        for split in _SPLITS:
            arrays = _read_split(folder, split)
            classes, numbers = np.unique(arrays["labels"], return_inverse=True)
            if twice := set(classes.tolist()) & set(names):
                raise DataError(f"{folder}: class {min(twice)!r} is in two splits")
            splits[split] = len(names) + np.arange(len(classes))
            labels.append(len(names) + numbers)
            names += classes.tolist()
            images.append(arrays["images"])
        return ImageSet.from_labels(np.concatenate(images), np.concatenate(labels), names, splits)


def _read_split(folder: Path, split: str) -> dict[str, np.ndarray]:
    npz, pickled, table = (folder / n for n in (f"{split}.npz", f"mini-imagenet-cache-{split}.pkl", f"{split}.csv"))
    if npz.is_file():
        return _read_npz(npz)
    if pickled.is_file():
        return _checked(pickled, *_from_cache(plain_pickle(pickled.read_bytes(), str(pickled)), pickled))
    if not table.is_file() or not (folder / "images").is_dir():
        raise DataNotFoundError(
            f"mini-ImageNet's {split} images are not in {folder}; put there {split}.csv and the folder images/, or "
            f"{split}.npz, or mini-imagenet-cache-{split}.pkl (ImageNet's terms do not allow downloading them for you)"
        )
    return cached(f"mini-imagenet-{split}-{DECODER}", [table, folder / "images"], lambda: _from_table(folder, table))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _checked(path, arrays["images"], arrays["labels"])
    except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz with images and labels ({error})") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds pickled objects, which would run code when loaded; refused") from None


def _from_cache(cache: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(cache, Mapping):
        raise DataError(f"{path} holds no mapping with image_data and class_dict")
    cache = {_text(key): value for key, value in cache.items()}
    images, classes = cache.get("image_data"), cache.get("class_dict")
    if not isinstance(images, np.ndarray) or not isinstance(classes, Mapping):
        raise DataError(f"{path} holds no image_data (an array) with class_dict (class → places)")
    labels = np.full(len(images), "", dtype=object)
    try:
        for name, places in classes.items():
            labels[np.asarray(places, np.int64)] = _text(name)
    except (IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path}: class_dict does not fit image_data ({error})") from None
    listed = labels != ""
    return images[listed], labels[listed].astype(str)


def _from_table(folder: Path, table: Path) -> dict[str, np.ndarray]:
    images, labels = [], []
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise DataError(f"{table}: the first line should be filename,label")
        for row in rows:
            line = rows.line_num
            if not (row["label"] or "").strip():
                raise DataError(f"{table}, line {line}: the label is missing")
            path = folder / "images" / Path(row["filename"] or "").name
            if not path.is_file():
                raise DataNotFoundError(f"{table}, line {line}: {path} is not there")
            images.append(decode(path.read_bytes(), str(path), _SIZE, "RGB"))
            labels.append(row["label"])
    if not images:
        raise DataError(f"{table} lists no images")
    return {"images": np.stack(images), "labels": np.array(labels)}


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    if images.dtype != np.uint8 or images.shape[1:] != (*_SIZE, 3) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images {images.shape} {images.dtype} with labels {labels.shape}; expected (N, 84, 84, 3) uint8 "
            "with (N,)"
        )
    if not len(images):
        raise DataError(f"{path} holds no images")
    return {"images": images, "labels": labels.astype(str)}


def _text(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)

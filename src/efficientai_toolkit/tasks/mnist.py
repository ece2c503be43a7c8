"""Handwritten digits (LeCun et al. 1998)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError
from .images import ImageFamily, ImageSet
from .storage import fetch

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/{}"
_FILES = {  # name → SHA-256
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class Mnist(ImageFamily):
    """MNIST at 28 × 28, ink 1 on background 0; all 70,000 images, split by digit.

    Training has the digits 0 to 5, validation 6 and 7, testing 8 and 9: ten classes make few tasks, so this
    family is for first steps and for continual learning. Settings: those of `ImageFamily`.
    """

    pixels = 28, 28, 1

    def read(self) -> ImageSet:
        train_x, train_y, test_x, test_y = read_parts(self.root)
        images, labels = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
        splits = {"train": np.arange(6), "val": np.arange(6, 8), "test": np.arange(8, 10)}
        return ImageSet.from_labels(images[..., None], labels, [str(digit) for digit in range(10)], splits)


def read_parts(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (60000, 28, 28) and labels, test images (10000, 28, 28) and labels; bytes.

    They are read from `mnist/` of the data folder `root`.
    """
    paths = [fetch(root, f"mnist/{n}", _URL.format(n), sha256=h, what="MNIST") for n, h in _FILES.items()]
    train_x, train_y, test_x, test_y = map(read_idx, paths)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or y.max(initial=0) > 9:
            raise DataError(f"{paths[0].parent}: images {x.shape} and labels {y.shape} are not MNIST's digits")
    return train_x, train_y, test_x, test_y


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format, gzipped: magic 0, 0, 8, number of axes; sizes; bytes."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})") from None
    axes = data[3] if data[:3] == b"\x00\x00\x08" and len(data) > 3 else 0
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * axes], ">u4")) if len(data) >= 4 + 4 * axes else ()
    if not axes or len(data) != 4 + 4 * axes + math.prod(shape):
        raise DataError(f"{path} is not an idx file of bytes, or not a whole one")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)

"""What the image families share: images by class, turned and scaled, and the decoding of files."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, TaskSamplingError
from .base import TaskConfig, where
from .classes import ClassFamily, shuffled


class ImageSet(NamedTuple):
    """Images sorted by class."""

    images: np.ndarray  # (M, H, W, C) uint8
    starts: np.ndarray  # (classes + 1,): class c is images[starts[c]:starts[c + 1]]
    names: list[str]  # of the classes
    splits: dict[str, np.ndarray]  # split → classes, in an order without meaning

    @classmethod
    def from_labels(
        cls, images: np.ndarray, labels: np.ndarray, names: list[str], splits: dict[str, np.ndarray]
    ) -> ImageSet:
        """Images in any order with their labels, numbers into `names`."""
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(names) + 1))
        return cls(images[order], starts, names, splits)


class ImageFamily(ClassFamily):
    """N-way K-shot classification of images; inputs are (H, W, C) float32 in [0, 1].

    Settings (`task_params`), besides those of `ClassFamily`:
        rotations: whether a class turned by 90°, 180° or 270° is a class of its own.
    """

    known_params = ClassFamily.known_params | {"rotations"}
    examples = "images"
    rotations = False

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        return self.data_set(config).images.shape[1:]

    def copies(self, config: TaskConfig) -> int:
        value = config.task_params.get("rotations", self.rotations)
        if not isinstance(value, bool):
            raise TaskSamplingError(f"{where(config)}: rotations is {value!r}; expected true or false")
        return 4 if value else 1

    def gather(self, config: TaskConfig, rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        images = self.data_set(config).images.take(rows, axis=0)  # (T, way, n, H, W, C)
        turns = self.copies(config)
        for turn in range(1, turns):
            turned = classes % turns == turn
            images[turned] = np.rot90(images[turned], turn, axes=(2, 3))
        return images

    def finish(self, x: np.ndarray) -> np.ndarray:
        return np.multiply(x, np.float32(1 / 255), dtype=np.float32)


def decode(data: bytes, name: str, size: tuple[int, int], mode: str) -> np.ndarray:
    """An image file as (H, W, C) uint8, resized with Lanczos' anti-aliasing filter; `mode` is "L" or "RGB".

    Gray of 16 bits is scaled to 8.

    Raises:
        DataError: the file, called `name`, is damaged or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image = _eight_bits(image).convert(mode)
            if image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
            return np.asarray(image, np.uint8).reshape(*size, -1)
    except UnidentifiedImageError:  # whose text names the buffer, not the file
        raise DataError(f"{name} is damaged, or no image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is damaged, or not an image that can be read ({error})") from None


def _eight_bits(image: Any) -> Any:
    """A gray image of 16 bits (modes I;16 and I) as one of 8, scaled: `convert` would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    from PIL import Image

    return Image.fromarray(((gray + 128) // 257).astype(np.uint8))


__all__ = ["ImageFamily", "ImageSet", "decode", "shuffled"]

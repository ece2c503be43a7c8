"""What the image families share: images by class, turned and scaled, and the decoding of files."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError, TaskSamplingError
from .base import TaskConfig, where
from .classes import ClassFamily, shuffled

DECODER = 2  # part of the names of caches: raised whenever `decode` makes other pixels of the same file
_ORIENTATION = 0x0112  # EXIF's tag, and how what it says is put upright
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


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
    ink = False  # files hold black strokes on white, which are read as 1 on 0
    pixels: tuple[int, int, int] | None = None  # (H, W, C), where all data sets of the family have the same

    def input_shape(self, config: TaskConfig) -> tuple[int, ...]:
        return self.pixels or self.data_set(config).images.shape[1:]

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

    The image is as a viewer shows it: upright by its EXIF orientation, what is transparent on white. Gray of 16 bits
    is scaled to 8.

    Raises:
        DataError: the file, called `name`, is damaged, no image, or gray on a scale that is not known.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # a TIFF puts itself upright here, a PNG reads what stands behind its pixels
            turn = _turn(image)
            image = _opaque(_eight_bits(image, name)).convert(mode)
            if turn is not None:
                image = image.transpose(turn)
            if image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
            return np.asarray(image, np.uint8).reshape(*size, -1)
    except UnidentifiedImageError:  # whose text names the buffer, not the file
        raise DataError(f"{name} is damaged, or no image") from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is damaged, or not an image that can be read ({error})") from None


def _turn(image: Any) -> Any:
    """What puts the image upright by its EXIF orientation, or `None`."""
    from PIL import Image

    try:
        said = image.getexif().get(_ORIENTATION)
    except Exception:  # of a damaged block Pillow raises whatever comes; the pixels are whole
        return None
    return Image.Transpose[_UPRIGHT[said]] if said in _UPRIGHT else None


def _opaque(image: Any) -> Any:
    """The image on white: the colour below full transparency is no part of it, and most often black."""
    if not image.has_transparency_data:
        return image
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _eight_bits(image: Any, name: str) -> Any:
    """A gray image of more than 8 bits as one of 8: `convert` would clip it to white.

    Of 16 bits (mode I;16) are its values in [0, 65535]; of 32 (mode I) they may be that or [0, 255].
    """
    if image.mode == "F":
        raise DataError(
            f"{name} holds gray as floating-point numbers, whose black and white are not known; save it with 8 or 16 "
            "bits a pixel"
        )
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    gray = np.asarray(image).astype(np.int64)
    low, high = gray.min(), gray.max()
    if low < 0 or high > 65535:
        raise DataError(f"{name} holds gray values from {low} to {high}; expected 0 to 255 or 0 to 65535")
    if image.mode != "I" or high > 255:
        gray = (gray + 128) // 257
    return Image.fromarray(gray.astype(np.uint8))


__all__ = ["DECODER", "ImageFamily", "ImageSet", "decode", "shuffled"]

"""Handwritten characters of 50 alphabets (Lake, Salakhutdinov & Tenenbaum 2015)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import TaskConfig, choice
from .images import ImageFamily, ImageSet, decode, shuffled
from .storage import cached, fetch

_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{}"
_PARTS = {"images_background": (30, 964), "images_evaluation": (20, 659)}  # alphabets, characters
_MD5 = {  # of Lake's archives, as torchvision has them
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
_DRAWINGS = 20  # of each character
PARTITIONS = ("standard", "alphabet")


class Omniglot(ImageFamily):
    """Omniglot at 28 × 28, ink 1 on background 0; a character turned by 90°, 180° or 270° is a class of its own.

    Settings (`task_params`), besides those of `ImageFamily`:
        partition: `standard`, 1200 characters for training, of which the last 100 for validation, and 423 for
            testing, in a fixed random order, as Santoro et al. (2016) and Finn et al. (2017) have it (their own
            random order was never published); or `alphabet`, Lake's parts, where testing has 20 alphabets of its
            own and validation 5 of the other 30.

    The data is `omniglot/images_background.zip` and `omniglot/images_evaluation.zip` of the data folder,
    downloaded where absent. A download is checked by its MD5; files of one's own are checked by what is in them,
    since re-packed copies have other checksums.
    """

    known_params = ImageFamily.known_params | {"partition"}
    rotations = True
    ink = True
    pixels = 28, 28, 1

    def variant(self, config: TaskConfig) -> tuple:
        return (PARTITIONS[max(choice(config, "partition", PARTITIONS), 0)],)

    def read(self, partition: str = "standard") -> ImageSet:
        paths = [
            fetch(self.root, f"omniglot/{p}.zip", _URL.format(f"{p}.zip"), md5=_MD5[p], what="Omniglot") for p in _PARTS
        ]
        arrays = cached("omniglot", paths, lambda: _decode_all(paths))
        names = [str(name) for name in arrays["names"]]
        starts = np.arange(len(names) + 1) * _DRAWINGS
        return ImageSet(arrays["images"], starts, names, _splits(names, partition))


def _decode_all(paths: list[Path]) -> dict[str, np.ndarray]:
    images, names = [], []
    for path, (part, expected) in zip(paths, _PARTS.items(), strict=True):
        try:
            with zipfile.ZipFile(path) as archive:
                characters: dict[str, list[str]] = {}
                for member in sorted(archive.namelist()):
                    if member.startswith(f"{part}/") and member.endswith(".png"):
                        characters.setdefault(member.rpartition("/")[0], []).append(member)
                _check(path, characters, expected)
                for character, drawings in characters.items():
                    names.append(character)
                    for member in drawings:
                        images.append(255 - decode(archive.read(member), f"{path}: {member}", (28, 28), "L"))
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{path} is not a whole zip archive ({error}); delete it to download it again") from None
    return {"images": np.stack(images), "names": np.array(names)}


def _check(path: Path, characters: dict[str, list[str]], expected: tuple[int, int]) -> None:
    found = len({name.split("/")[1] for name in characters}), len(characters)
    if found != expected:
        raise DataError(
            f"{path} holds {found[0]} alphabets with {found[1]} characters; Omniglot's has {expected[0]} with "
            f"{expected[1]}"
        )
    for name, drawings in characters.items():
        if len(drawings) != _DRAWINGS:
            raise DataError(f"{path} holds {len(drawings)} drawings of {name}; expected {_DRAWINGS}")


def _splits(names: list[str], partition: str) -> dict[str, np.ndarray]:
    order = shuffled(len(names), "omniglot")
    if partition == "standard":
        return {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}
    part, alphabet = np.array([name.split("/")[:2] for name in names]).T
    background = np.unique(alphabet[part == "images_background"])
    held_out = background[shuffled(len(background), "omniglot alphabets")[-5:]]
    of = {
        "train": (part == "images_background") & ~np.isin(alphabet, held_out),
        "val": np.isin(alphabet, held_out),
        "test": part == "images_evaluation",
    }
    return {split: order[mask[order]] for split, mask in of.items()}

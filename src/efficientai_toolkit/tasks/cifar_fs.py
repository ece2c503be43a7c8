"""CIFAR-FS (Bertinetto et al. 2019), and the reader of CIFAR-100 that it shares with FC100."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError
from .images import ImageFamily, ImageSet
from .storage import cached, fetch
from .unpickling import plain_pickle

_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
_SPLIT_URL = (
    "https://raw.githubusercontent.com/ArnoutDevos/maml-cifar-fs/56b8dfd367d916d1f5b8ec53ae6c9e747232dc71/"
    "data/CIFARFS/cifar-fs-splits/{}"
)
_SPLIT_SHA256 = {
    "train": "08d41acf21db7203341442e96b2226276217e379bbf809af34849506af1a8c5e",
    "val": "e9ca1bb0404d6f804eb4df42923187eb07052a0c2f87820342b0da1f8c940278",
    "test": "3720c9d858fa547dbf71ca80ede1f94a803279cfdedd3f7a9b9d3beb4ce5c020",
}
_FOLDER, _MEMBERS = "cifar-100-python", ("train", "test", "meta")


class CifarFS(ImageFamily):
    """CIFAR-FS: the 100 classes of CIFAR-100, 600 images each, 32 × 32 × 3, split 64 / 16 / 20 at random.

    The data folder holds `cifar-100-python.tar.gz` or the unpacked `cifar-100-python/`, and
    `cifar-fs/{train,val,test}.txt`, one class name a line; both are downloaded where absent.
    Settings: those of `ImageFamily`.
    """

    pixels = 32, 32, 3

    def read(self) -> ImageSet:
        arrays = read_cifar100(self.root)
        names = arrays["fine_names"].tolist()
        splits = {}
        for split, digest in _SPLIT_SHA256.items():
            url = _SPLIT_URL.format(f"{split}.txt")
            path = fetch(self.root, f"cifar-fs/{split}.txt", url, sha256=digest, what="the list of CIFAR-FS classes")
            wanted = path.read_text("utf-8", "replace").split()
            if unknown := [name for name in wanted if name not in names]:
                raise DataError(f"{path}: {unknown[0]!r} is no class of CIFAR-100")
            splits[split] = np.array([names.index(name) for name in wanted], np.int64)
        if len(np.unique(np.concatenate([*splits.values()]))) != sum(map(len, splits.values())):
            raise DataError(f"{self.root / 'cifar-fs'}: a class is in two of the three lists")
        return ImageSet.from_labels(arrays["images"], arrays["fine"], names, splits)


def read_cifar100(root: Path) -> dict[str, np.ndarray]:
    """`images` (N, 32, 32, 3), `fine` and `coarse` labels (N,), and the class names of each, from the data folder."""
    folder = root / _FOLDER
    if folder.is_dir():
        for name in _MEMBERS:
            if not (folder / name).is_file():
                raise DataNotFoundError(f"{folder / name} is not there; {folder} should hold {', '.join(_MEMBERS)}")
        sources = [folder / name for name in _MEMBERS]
        return cached("cifar100", sources, lambda: _decode([p.read_bytes() for p in sources], str(folder)))
    archive = fetch(root, f"{_FOLDER}.tar.gz", _URL, sha256=_SHA256, what="CIFAR-100")
    return cached("cifar100", [archive], lambda: _decode(_untar(archive), str(archive)))


def _untar(path: Path) -> list[bytes]:
    try:
        with tarfile.open(path) as archive:
            files = [archive.extractfile(f"{_FOLDER}/{name}") for name in _MEMBERS]
            return [file.read() for file in files if file is not None]
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{path} is not CIFAR-100's archive, or not a whole one ({error})") from None


def _decode(members: list[bytes], where: str) -> dict[str, np.ndarray]:
    *batches, names = (plain_pickle(d, f"{where}, {name}") for d, name in zip(members, _MEMBERS, strict=True))
    try:
        images = np.concatenate([batch[b"data"] for batch in batches])
        labels = {k: np.concatenate([b[f"{k}_labels".encode()] for b in batches]) for k in ("fine", "coarse")}
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        text = {f"{k}_names": np.array([n.decode() for n in names[f"{k}_label_names".encode()]]) for k in labels}
        counts = {images.shape[0], *(len(each) for each in labels.values())}
        fits = all(each.min() >= 0 and each.max() < len(text[f"{k}_names"]) for k, each in labels.items())
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{where} does not hold CIFAR-100's fields ({error})") from None
    if images.dtype != np.uint8 or len(counts) != 1 or not fits:
        raise DataError(f"{where}: images {images.shape} {images.dtype} and their labels do not fit together")
    return {"images": np.ascontiguousarray(images), **labels, **text}

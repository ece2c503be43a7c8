"""Few-shot CIFAR-100 (Oreshkin, Rodríguez & Lacoste 2018)."""

from __future__ import annotations

import numpy as np

from .cifar_fs import read_cifar100
from .images import ImageFamily, ImageSet

# Superclasses of validation and testing, by their numbers in CIFAR-100; the other twelve are for training.
_VAL, _TEST = (8, 11, 13, 16), (0, 7, 12, 14)


class FC100(ImageFamily):
    """FC100: CIFAR-100 split by superclass, 12 / 4 / 4, so that training and testing have little in common.

    That leaves 60 / 20 / 20 classes with 600 images each, 32 × 32 × 3. The data folder holds CIFAR-100 as for
    `cifar_fs`. Settings: those of `ImageFamily`.
    """

    pixels = 32, 32, 3

    def read(self) -> ImageSet:
        arrays = read_cifar100(self.root)
        classes, first = np.unique(arrays["fine"], return_index=True)
        superclass = arrays["coarse"][first]
        val, test = np.isin(superclass, _VAL), np.isin(superclass, _TEST)
        splits = {"train": classes[~val & ~test], "val": classes[val], "test": classes[test]}
        return ImageSet.from_labels(arrays["images"], arrays["fine"], arrays["fine_names"].tolist(), splits)

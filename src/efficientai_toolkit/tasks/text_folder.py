"""A user's own texts: one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError
from .folders import Classes, class_folders, visible
from .text import Corpus, TextFamily, split_classes


class TextFolder(TextFamily):
    """Texts in a tree `CLASS/….txt`, one text a file.

    The tree is the folder `text_folder/` of the data folder, or the data folder itself. Where its folders are
    `train/`, `val/` and `test/`, each holds its split's classes, none of them another's too; otherwise the classes
    are split 60 / 20 / 20 in a fixed random order. (Texts in one file of `text,label` are read by the family
    `intents`.)
    """

    max_length = 128

    def corpus(self) -> Corpus:
        root = self.root / "text_folder" if (self.root / "text_folder").is_dir() else self.root
        tree = class_folders(root, _classes)
        names, texts, labels, splits = [], [], [], {}
        for split, classes in tree.items():
            splits[split] = len(names) + np.arange(len(classes))
            for name, files in classes.items():
                labels += [len(names)] * len(files)
                names.append(f"{split}/{name}" if split else name)
                texts += map(_text, files)
        if "" in tree:
            splits = split_classes(len(names), "text_folder")
        return Corpus(texts, np.array(labels), names, splits, [""] * len(names))


def _classes(folder: Path) -> Classes:
    classes = {
        child.name: files
        for child in visible(folder)
        if child.is_dir() and (files := [path for path in visible(child) if path.suffix == ".txt"])
    }
    if not classes:
        raise DataNotFoundError(f"no texts in {folder}; expected a folder for each class, with its .txt files in it")
    return classes


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise DataError(f"{path} is empty")
    return text

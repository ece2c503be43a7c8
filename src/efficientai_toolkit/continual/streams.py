"""The sequences of contexts that a scenario can be made of, each from a data set or from a user's files."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from ..errors import ConfigurationError, DataError, DataNotFoundError, did_you_mean
from ..tasks.intents import IntentRows, read_intents
from ..tasks.storage import data_root
from .scenarios import Part, Rows, Scenario, split_by_class

_NUMBER = 5


def split_mnist(data_dir: Path | None, seed: int, contexts: int = _NUMBER) -> tuple[Part, ...]:
    """The ten digits in random order, two at a time; 28 × 28 bytes as rows of 784."""
    train, test = _mnist(data_dir)
    order = np.random.default_rng([seed, 10]).permutation(10)
    groups = [list(map(int, group)) for group in _groups(order, contexts)]
    return split_by_class(["/".join(map(str, group)) for group in groups], train, test, groups)


def permuted_mnist(data_dir: Path | None, seed: int, contexts: int = 10) -> tuple[Part, ...]:
    """All ten digits, padded to 32 × 32, each context with an order of the 1,024 pixels of its own."""
    (train_x, train_y), (test_x, test_y) = _mnist(data_dir)

    def permuted(x: np.ndarray, y: np.ndarray, number: int) -> Rows:
        order = np.random.default_rng([seed, 11, number]).permutation(32 * 32)
        padded = np.pad(x.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))).reshape(len(x), -1)
        return np.ascontiguousarray(padded[:, order]), y

    return tuple(
        Part(f"order {k + 1}", 10, partial(permuted, train_x, train_y, k), partial(permuted, test_x, test_y, k))
        for k in range(contexts)
    )


def split_omniglot(data_dir: Path | None, seed: int, contexts: int = 10) -> tuple[Part, ...]:
    """One alphabet a context, in random order; of each character 15 drawings to train on and 5 to test."""
    from ..tasks.omniglot import Omniglot

    images, _, names, _ = Omniglot(data_dir).read()
    alphabets: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        alphabets.setdefault(name.rpartition("/")[0].rpartition("/")[2], []).append(number)
    order = np.random.default_rng([seed, 12]).permutation(len(alphabets))[:contexts]
    drawings = images.reshape(len(names), -1, *images.shape[1:])
    parts = []
    for name in (list(alphabets)[i] for i in order):
        x = drawings[alphabets[name]]
        labels = np.repeat(np.arange(len(x)), x.shape[1]).reshape(x.shape[:2])
        half = x.shape[1] * 3 // 4
        flat = [part.reshape(-1, *x.shape[2:]) for part in (x[:, :half], x[:, half:])]
        parts.append(Part.of(name, flat[0], labels[:, :half].ravel(), flat[1], labels[:, half:].ravel()))
    return tuple(parts)


def split_cifar100(data_dir: Path | None, seed: int, contexts: int = 10) -> tuple[Part, ...]:
    """The hundred fine classes in random order, ten at a time, from the binary version's `train.bin` and `test.bin`.

    A record is a coarse label, a fine label and 3 × 32 × 32 bytes.
    """
    rows = []
    for name, count in (("train", 50_000), ("test", 10_000)):
        path = data_root(data_dir) / "cifar-100-binary" / f"{name}.bin"
        if not path.is_file():
            raise DataNotFoundError(
                f"CIFAR-100 is not at {path}; unpack there what www.cs.toronto.edu/~kriz/cifar.html calls its "
                "binary version"
            )
        data = np.fromfile(path, np.uint8)
        if data.size != count * 3074:
            raise DataError(f"{path} has {data.size} bytes; CIFAR-100's {name} set has {count * 3074}")
        data = data.reshape(count, 3074)
        rows.append((data[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), data[:, 1].astype(np.int32)))
    groups = _groups(np.random.default_rng([seed, 13]).permutation(100), contexts)
    names = [f"classes {i + 1}" for i in range(contexts)]
    return split_by_class(names, rows[0], rows[1], [list(map(int, g)) for g in groups])


def clinc150(data_dir: Path | None, seed: int, contexts: int = 10) -> tuple[Part, ...]:
    """Intents of one domain a context (banking, travel, …), in random order."""
    rows = read_intents("clinc150", data_root(data_dir))
    domains: dict[str, list[str]] = {}
    for intent, domain in rows.domains.items():
        domains.setdefault(domain, []).append(intent)
    order = np.random.default_rng([seed, 14]).permutation(len(domains))[:contexts]
    return _texts([list(domains.items())[i] for i in order], rows)


def banking77(data_dir: Path | None, seed: int, contexts: int = 7) -> tuple[Part, ...]:
    """The 77 intents in random order, in equal groups."""
    rows = read_intents("banking77", data_root(data_dir))
    groups = _groups(np.random.default_rng([seed, 15]).permutation(sorted(rows.domains)), contexts)
    return _texts([(f"intents {i + 1}", [str(name) for name in group]) for i, group in enumerate(groups)], rows)


def glue(data_dir: Path | None, seed: int, contexts: int | None = None) -> tuple[Part, ...]:
    """One GLUE task a context, in random order; the published training and development rows."""
    from ..tasks.glue import TASKS, read_glue

    return _benchmark(TASKS, partial(read_glue, data_root(data_dir)), seed, contexts)


def superglue(data_dir: Path | None, seed: int, contexts: int | None = None) -> tuple[Part, ...]:
    """One SuperGLUE task a context, in random order; the published training and validation rows."""
    from ..tasks.superglue import TASKS, read_superglue

    return _benchmark(TASKS, partial(read_superglue, data_root(data_dir)), seed, contexts)


def files(paths: Sequence[Path | str]) -> tuple[Part, ...]:
    """A user's own contexts: one `.npz` each with `train_x`, `train_y`, `test_x`, `test_y`; inputs of one shape."""
    parts: list[Part] = []
    shapes: dict[tuple[int, ...], Path] = {}  # of an input, and the first file that has it
    for path in map(Path, paths):
        try:
            with path.open("rb") as file, _arrays(file, path) as arrays:
                missing = [n for n in ("train_x", "train_y", "test_x", "test_y") if n not in arrays]
                if missing:
                    raise DataError(f"{path} has no array {missing[0]!r}{did_you_mean(missing[0], arrays.files)}")
                parts.append(
                    Part.of(path.stem, arrays["train_x"], arrays["train_y"], arrays["test_x"], arrays["test_y"])
                )
        except FileNotFoundError:
            raise DataNotFoundError(f"{path} is not there") from None
        except DataError as error:
            raise error if str(path) in str(error) else DataError(f"{path}: {error}") from None
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error, NotImplementedError) as error:
            raise DataError(f"{path} is no .npz of plain arrays ({error})") from None
        shapes.setdefault(parts[-1].test()[0].shape[1:], path)
    if len(shapes) > 1:
        (shape, first), (other, second) = list(shapes.items())[:2]
        raise DataError(f"inputs of {first} are {shape}, of {second} {other}; all contexts need the same")
    return tuple(parts)


STREAMS: dict[str, Callable[..., tuple[Part, ...]]] = {
    "split-mnist": split_mnist,
    "permuted-mnist": permuted_mnist,
    "split-omniglot": split_omniglot,
    "split-cifar100": split_cifar100,
    "clinc150": clinc150,
    "banking77": banking77,
    "glue": glue,
    "superglue": superglue,
}


def build_scenario(
    stream: str | Sequence[Path | str],
    kind: str = "task",
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    contexts: int | None = None,
    active: str = "all",
) -> Scenario:
    """A scenario over a stream by name, or over a list of files (see `files`).

    Args:
        stream: one of `STREAMS`, or paths.
        kind: "task", "domain" or "class".
        data_dir: parent of the data sets.
        seed: of the order of classes, domains or pixels.
        contexts: how many, of files the first ones; default the stream's own number.
        active: see `Scenario`.

    Raises:
        ConfigurationError: the stream has not as many contexts, or an argument is impossible.
    """
    if contexts is not None and contexts < 1:
        raise ConfigurationError(f"contexts must be at least 1, got {contexts}")
    if not isinstance(stream, str):
        name, parts = "files", files(stream)[:contexts]
    elif stream in STREAMS:
        name, parts = stream, STREAMS[stream](data_dir, seed, **({} if contexts is None else {"contexts": contexts}))
    else:
        raise ConfigurationError(f"unknown stream {stream!r}{did_you_mean(stream, STREAMS)}")
    if contexts is not None and len(parts) < contexts:
        raise ConfigurationError(f"{name} has {len(parts)} contexts, not {contexts}")
    return Scenario(name, kind, parts, active)


def hashed_words(texts: Sequence[str], size: int = 2048) -> np.ndarray:
    """(N, size): words and pairs of words, hashed, as unit vectors. Needs no vocabulary, so no context leaks.

    Reference: Weinberger et al. (2009), Feature hashing for large scale multitask learning, ICML.
    """
    rows = np.zeros((len(texts), size), np.float32)
    for row, text in zip(rows, texts, strict=True):
        words = re.findall(r"[a-z0-9']+", text.lower())
        for token in (*words, *map(" ".join, itertools.pairwise(words))):
            code = zlib.crc32(token.encode())
            row[code % size] += 1 if code >> 31 else -1
        row /= max(float(np.linalg.norm(row)), 1e-6)
    return rows


def _arrays(file: BinaryIO, path: Path) -> NpzFile:
    found = np.load(file, allow_pickle=False)
    if not isinstance(found, NpzFile):
        raise DataError(f"{path} is one array (.npy); save the four arrays by np.savez")
    return found


def _groups(classes: np.ndarray, contexts: int) -> list[np.ndarray]:
    """As many nearly equal groups of classes."""
    if contexts > len(classes):
        raise ConfigurationError(f"there are {len(classes)} classes, not enough for {contexts} contexts")
    return np.array_split(classes, contexts)


def _mnist(data_dir: Path | None) -> tuple[Rows, Rows]:
    from ..tasks.mnist import read_parts

    train_x, train_y, test_x, test_y = read_parts(data_root(data_dir))
    return (train_x.reshape(len(train_x), -1), train_y), (test_x.reshape(len(test_x), -1), test_y)


def _texts(groups: Sequence[tuple[str, Sequence[str]]], rows: IntentRows) -> tuple[Part, ...]:
    """Contexts of named groups of intents; the published training and test rows."""
    parts = []
    for name, intents in groups:
        place = {intent: number for number, intent in enumerate(intents)}
        arrays = []
        for which in ("train", "test"):
            here = [
                (text, place[label])
                for text, label, part in zip(rows.texts, rows.labels, rows.parts, strict=True)
                if part == which and label in place
            ]
            arrays += [hashed_words([text for text, _ in here]), np.array([label for _, label in here], np.int32)]
        parts.append(Part.of(name, *arrays))
    return tuple(parts)


def _benchmark(
    tasks: Mapping[str, Any], read: Callable[[str, str], list], seed: int, contexts: int | None
) -> tuple[Part, ...]:
    """The tasks that have both training and development rows; a pair of texts counts as one text."""
    parts = []
    for name in np.random.default_rng([seed, 16]).permutation(sorted(tasks)).tolist():
        place = {label: number for number, label in enumerate(tasks[name].labels)}
        rows = [read(name, which) for which in ("train", "dev")]
        if all(rows):
            arrays = []
            for part in rows:
                texts = [text if isinstance(text, str) else " ".join(text) for text, _ in part]
                arrays += [hashed_words(texts), np.array([place[label] for _, label in part], np.int32)]
            parts.append(Part.of(name, *arrays))
    return tuple(parts[:contexts])

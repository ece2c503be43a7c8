"""Examples that are numbers: a CSV whose last column is `label`, or an `.npz` with `x` and `y`."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np

from ..errors import DataError
from .labelled import decoded, fail, label_fault, read_bytes


def read_numbers(path: str | Path, *, labelled: bool = True) -> tuple[np.ndarray, list[str] | None]:
    """(x (N, …) float32, labels) of the file `path`.

    Args:
        path: `.npz` with the arrays `x` (N, …) and `y` (N,), or a CSV with a header: numbers, and one column `label`.
        labelled: labels are needed.

    Raises:
        DataError: with the line of every bad row (the first five of them).
    """
    path = Path(path)
    data = read_bytes(path)
    x, labels = _from_npz(path, data) if path.suffix == ".npz" else _from_csv(path, data)
    if labelled and labels is None:
        raise DataError(f"{path} has no {'array y' if path.suffix == '.npz' else 'column label'}")
    faults = [(i, fault) for i, label in enumerate(labels or (), 1) if (fault := label_fault(label))]
    fail([f"example {i}: {fault}" for i, fault in faults], str(path))
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
        raise DataError(f"{path}: example {row + 1} holds a number that is not finite")
    return x, labels


def _from_npz(path: Path, data: bytes) -> tuple[np.ndarray, list[str] | None]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            x = np.asarray(arrays["x"], np.float32)
            labels = [str(label) for label in arrays["y"].tolist()] if "y" in arrays else None
    except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz with the arrays x and y ({error})") from None
    if x.ndim < 2 or not len(x) or (labels is not None and len(labels) != len(x)):
        raise DataError(f"{path}: x is {x.shape} with {len(labels or ())} labels; expected (N, …) and (N,)")
    return x, labels


def _from_csv(path: Path, data: bytes) -> tuple[np.ndarray, list[str] | None]:
    text = decoded(data, str(path))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}") from None
    if not rows:
        raise DataError(f"{path} has no rows below its header")
    at = header.index("label") if "label" in header else None
    values, labels, faults = [], [], []
    for line, cells in rows:
        if len(cells) != len(header):
            faults.append(f"line {line}: {len(cells)} columns where the header has {len(header)}")
            continue
        try:
            values.append([float(cell) for i, cell in enumerate(cells) if i != at])
        except ValueError:
            bad = next(cell for i, cell in enumerate(cells) if i != at and not _is_number(cell))
            faults.append(f"line {line}: {bad!r} is not a number")
        if at is not None and not cells[at].strip():
            faults.append(f"line {line}: the label is missing")
        labels.append(cells[at].strip() if at is not None else "")
    fail(faults, str(path))
    return np.array(values, np.float32), labels if at is not None else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

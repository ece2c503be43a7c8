"""Examples that are numbers: a CSV with a column `label` (or `target`, `y`), or an `.npz` with `x` and `y`."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from ..errors import DataError
from .labelled import decoded, fail, label_fault, read_bytes

# What the column of labels, or of a regression's targets, may be called; the first that a file has is it.
_LABELS, _TARGETS = ("label",), ("label", "target", "y")


def read_numbers(
    path: str | Path, *, labelled: bool = True, columns: list[str] | None = None, regression: bool = False
) -> tuple[np.ndarray, list[str] | None]:
    """(x (N, …), labels) of the file `path`; x is float32, or of the whole numbers that an `.npz` holds.

    Args:
        path: `.npz` with the arrays `x` (N, …) and `y` (N,), or a CSV with a header: numbers, and one column `label`.
            Where no labels are needed, a CSV of nothing but numbers has no header (unless its first line is 0, 1, …
            or 1, 2, …, of two columns and more), and a column `label` may be blank throughout. "-" is a CSV on
            standard input.
        labelled: labels are needed.
        columns: names of the numbers in the order that is wanted; a CSV's header must have these, in any order.
        regression: the column of labels may be called `target` or `y`, too.

    Raises:
        DataError: with the line of every bad row (the first five of them); a column is missing, or unknown.
    """
    if str(path) == "-":
        path, data = Path("standard input"), sys.stdin.buffer.read()
    else:
        path, data = Path(path), read_bytes(path)
    if path.suffix == ".npz":
        x, labels = _from_npz(path, data)
    else:
        x, labels = _from_csv(path, data, labelled, columns, regression)
    if labelled and labels is None:
        raise DataError(f"{path} has no array y")
    faults = [(i, fault) for i, label in enumerate(labels or (), 1) if (fault := label_fault(label))]
    fail([f"example {i}: {fault}" for i, fault in faults], str(path))
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))[0])
        raise DataError(f"{path}: example {row + 1} holds a number that is not finite, or beyond ±3.4e38 (float32)")
    return x, labels


def column_names(path: str | Path, *, regression: bool = False) -> list[str] | None:
    """Names of the numbers in the header of the CSV `path`, in its order; an `.npz` has none."""
    path = Path(path)
    if path.suffix == ".npz":
        return None
    header, label, _ = _table(path, read_bytes(path), None, regression)
    return [cell for i, cell in enumerate(header) if i != label]


def _from_npz(path: Path, data: bytes) -> tuple[np.ndarray, list[str] | None]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            x = arrays["x"]
            labels = [str(label) for label in arrays["y"].tolist()] if "y" in arrays else None
    except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz with the arrays x and y ({error})") from None
    if x.dtype.kind not in "biuf":
        raise DataError(f"{path}: x holds {x.dtype}; expected numbers")
    if x.dtype.kind in "bf":
        x = _float32(x)
    if x.ndim < 2 or not len(x) or (labels is not None and len(labels) != len(x)):
        raise DataError(f"{path}: x is {x.shape} with {len(labels or ())} labels; expected (N, …) and (N,)")
    return x, labels


def _from_csv(
    path: Path, data: bytes, labelled: bool, columns: list[str] | None, regression: bool
) -> tuple[np.ndarray, list[str] | None]:
    header, at, rows = _table(path, data, columns, regression)
    names = [cell for i, cell in enumerate(header) if i != at]
    if labelled and at is None:
        what = "targets" if regression else "labels"
        raise DataError(
            f"{path} has no column label: its columns are {', '.join(header)}; name that of the {what} label"
        )
    # pandas and NumPy name columns 0, 1, … (others 1, 2, …) where nobody does. One column's 0 or 1 is taken for a row.
    numbered = len(names) > 1 and any(names == [str(i) for i in range(first, first + len(names))] for first in (0, 1))
    named = (numbered and columns is None) or sorted(names) == sorted(columns or ()) or not all(map(_is_number, names))
    if at is None and not named:  # the first line is a row
        rows, order = [(1, header), *rows], list(range(len(names)))
    else:
        order = list(range(len(names))) if columns is None else _order(names, columns, path)
    if not rows:
        raise DataError(f"{path} has no rows below its header")
    values, labels, faults = [], [], []
    blank = at is not None and not labelled and not any(cells[at].strip() for _, cells in rows if at < len(cells))
    for line, cells in rows:
        if len(cells) != len(header):
            faults.append(f"line {line}: {len(cells)} columns where the header has {len(header)}")
            continue
        numbers = [cell for i, cell in enumerate(cells) if i != at]
        try:
            values.append([float(cell) for cell in numbers])
        except ValueError:
            bad = next(cell for cell in numbers if not _is_number(cell))
            faults.append(f"line {line}: {bad!r} is not a number")
        if at is not None and not blank and not cells[at].strip():
            faults.append(f"line {line}: the {header[at]} is missing")
        labels.append(cells[at].strip() if at is not None else "")
    fail(faults, str(path))
    return _float32(np.array(values)[:, order]), None if at is None or blank else labels


def _table(
    path: Path, data: bytes, columns: list[str] | None, regression: bool
) -> tuple[list[str], int | None, list[tuple[int, list[str]]]]:
    """The first line's cells, the place of `label` among them, and (line, cells) of the others that are not blank."""
    text = decoded(data, str(path))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}") from None
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{path}, line 1: the separator is {other!r}; expected ',' between columns, and '.' in numbers")
    for name in _TARGETS if regression else _LABELS:
        # A column that the model is to read is no target, whatever its name; `label` is reserved.
        taken = () if name == "label" else columns or ()
        places = [i for i, cell in enumerate(header) if cell.lower() == name and cell not in taken]
        if len(places) > 1:
            raise DataError(f"{path}, line 1: {len(places)} columns {name}; expected one")
        if places:
            return header, places[0], rows
    return header, None, rows


def _order(names: list[str], columns: list[str], path: Path) -> list[int]:
    """Where in `names` each of `columns` is."""
    if names == columns:
        return list(range(len(names)))
    faults = [f"no column {name!r}" for name in columns if name not in names]
    faults += [f"unknown column {name!r}" for name in names if name not in columns]
    faults += [f"{names.count(name)} columns {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1]
    fail(faults, f"{path}, line 1, where the columns of the adapted examples are expected in any order")
    return [names.index(name) for name in columns]


def _float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, which is refused
        return x.astype(np.float32)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

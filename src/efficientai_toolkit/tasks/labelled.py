"""Files of texts and labels: CSV, TSV, JSON lines or plain lines, every bad row named by its line."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, DataNotFoundError, did_you_mean, nearest

_SHOWN = 5  # faults that one error names
_COLUMNS = ("text", "label")
# A cell of a tab-separated file and what ends it: in quotes as spreadsheets write them, or every character as it is.
_TAB_CELL = re.compile(r'(?:"((?:[^"\t]|"")*)"|([^\t\r\n]*))(\t|\r\n|[\r\n]|\Z)')
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?(?:\r\n|[\r\n])', re.IGNORECASE)  # which Excel puts first
_ARCHIVE = b"PK\x03\x04"  # with which .xlsx begins
_BREAKS = ("Cc", "Zl", "Zp")  # control characters, and the separators of lines and paragraphs


class Example(NamedTuple):
    """One text, the line of the file on which it begins, and its label (None where the file has none)."""

    line: int
    text: str
    label: str | None


def read_examples(path: str | Path, *, labelled: bool = True) -> list[Example]:
    """The rows of the file `path`, in its order.

    Args:
        path: `.csv` and `.tsv` with a header `text,label` and cells that may be quoted, `.jsonl` with one object
            `{"text": …, "label": …}` a line, or, where no labels are needed, any other name with one text a line.
            A label is a string, a number, true or false, of one line and without tabs.
        labelled: a label is needed in every row; else the column may be missing.

    Raises:
        DataError: with the line of every bad row (the first five of them).
    """
    path = Path(path)
    return parse_examples(read_bytes(path), str(path), path.suffix.lower(), labelled=labelled)


def parse_examples(data: bytes, name: str, kind: str, *, labelled: bool = True) -> list[Example]:
    """`read_examples` of bytes; `name` is for errors, `kind` the suffix that says the format."""
    text = decoded(data, name)
    if not text.strip():
        raise DataError(f"{name} is empty; expected {'text and label' if labelled else 'a text'} in every row")
    faults: list[str] = []
    if kind in (".csv", ".tsv"):
        rows = _from_csv(text, name, "\t" if kind == ".tsv" else ",", labelled, faults)
    elif kind in (".jsonl", ".json", ".ndjson"):
        rows = _from_json_lines(text, name, faults)
    elif labelled:
        raise DataError(f"{name}: files of texts and labels are .csv, .tsv or .jsonl")
    else:
        lines = lines_of(text)
        while not lines[-1].strip():
            lines.pop()
        rows = (Example(i, line, None) for i, line in enumerate(lines, 1))  # a line an input, so none is skipped
    examples = []
    for row in rows:
        if not row.text.strip():
            faults.append(f"line {row.line}: the text is empty")
        elif labelled and not (row.label or "").strip():
            faults.append(f"line {row.line}: the label is missing")
        else:
            # What looks the same is the same: a Mac's file names, for one, keep an accent apart from its letter.
            label = None if row.label is None else unicodedata.normalize("NFC", row.label.strip())
            if label and (fault := label_fault(label)):
                faults.append(f"line {row.line}: {fault}")
            examples.append(Example(row.line, row.text, label))
    fail(faults, name)
    if not examples:
        raise DataError(f"{name} has a header and no rows")
    return examples


def label_fault(label: str) -> str | None:
    """Why `label` cannot be one: `predict` says a label a line, with a tab behind it."""
    bad = next((mark for mark in label if unicodedata.category(mark) in _BREAKS), None)
    return bad and f"the label {label!r:.60} holds {bad!r}; expected one line without tabs"


def read_bytes(path: str | Path) -> bytes:
    """The file at `path`; one that is not there or cannot be read is a `DataError`."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataNotFoundError(f"there is no file at {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def decoded(data: bytes, name: str) -> str:
    """UTF-8 (with or without its mark) as text; the line of the first byte that is not is named."""
    if data.startswith(_ARCHIVE):
        raise DataError(f"{name} is an Excel workbook or another archive; export it as CSV, in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{name}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from None


def lines_of(text: str) -> list[str]:
    """The lines of `text`, which end at LF, CRLF or CR alone: other separators may stand within a text."""
    return re.split(r"\r\n|\n|\r", text)


def fail(faults: list[str], name: str) -> None:
    """Raise a `DataError` with the first five faults, where there is one."""
    if faults:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise DataError(f"{name}: {'; '.join(faults[:_SHOWN])}{more}")


def require_classes(examples: list[Example], name: str) -> list[str]:
    """The labels in order of first appearance; one alone cannot be told from anything.

    Raises:
        DataError: there is only one.
    """
    labels = list(dict.fromkeys(str(example.label) for example in examples))
    if len(labels) < 2:
        first, last = examples[0].line, examples[-1].line
        raise DataError(
            f"{name}, lines {first} to {last}: every example is {labels[0]!r}; at least two labels are needed"
        )
    return labels


def _from_csv(text: str, name: str, delimiter: str, labelled: bool, faults: list[str]) -> Iterator[Example]:
    first, stated = 1, _SEPARATOR_LINE.match(text)
    if stated:
        if stated[1] != delimiter:
            raise DataError(f"{name}, line 1: the separator is {stated[1]!r} and must be {delimiter!r}")
        first, text = 2, text[stated.end() :]
    _check_separator(re.split(r"[\r\n]", text, maxsplit=1)[0], name, first, delimiter)
    rows = _tab_rows(text, first) if delimiter == "\t" else iter(_comma_rows(text, first, faults))
    header = [cell.strip().lower() for cell in next(rows, (first, []))[1]]
    if faults:
        return
    width = len(header)
    while header and not header[-1]:  # left behind by columns that were deleted
        header.pop()
    _check_header(header, name, first, labelled)
    where_text, where_label = header.index("text"), header.index("label") if "label" in header else None
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= width and not any(cell.strip() for cell in cells[len(header) :]):
            cells = cells[: len(header)]
        if len(cells) != len(header):
            faults.append(f"line {line}: {len(cells)} columns where the header has {len(header)}")
        else:
            yield Example(line, cells[where_text], None if where_label is None else cells[where_label])


def _comma_rows(text: str, first: int, faults: list[str]) -> list[tuple[int, list[str]]]:
    """(line, cells) of each row, lines counted from `first`; one that cannot be read goes to `faults` and ends them."""
    reader, line, rows = csv.reader(io.StringIO(text, newline=""), strict=True), first, []
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, len(text)))  # its own limit is for files of unknown length
    try:
        for cells in reader:
            rows.append((line, cells))
            line = first + reader.line_num
    except csv.Error as error:
        faults.append(f"line {line}: not valid CSV ({error})")
    finally:
        csv.field_size_limit(before)
    return rows


def _tab_rows(text: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. Quotes count where they are a cell's first and last character and double within it."""
    line, cells = first, []
    for cell in _TAB_CELL.finditer(text):
        quoted, plain, end = cell.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        if end != "\t":
            yield first, cells
            cells = []
        line += len(lines_of(cell[0])) - 1
        first = line if end != "\t" else first


def _check_separator(line: str, name: str, number: int, delimiter: str) -> None:
    """`line` is a header's; spreadsheets of some languages separate by semicolons."""
    for other in ",;\t|":
        cells = [cell.strip(' "').lower() for cell in line.split(other)]
        if other != delimiter and len(cells) > 1 and {"text"} <= set(cells) <= {*_COLUMNS, ""}:
            raise DataError(f"{name}, line {number}: the separator is {other!r} and must be {delimiter!r}")


def _check_header(header: list[str], name: str, number: int, labelled: bool) -> None:
    needed = _COLUMNS if labelled else ("text",)
    wanted = ",".join(needed)
    if not any(column in _COLUMNS or nearest(column, _COLUMNS) for column in header):
        raise DataError(
            f"{name}, line {number}: no column is called {' or '.join(needed)}; expected the header {wanted}"
        )
    for column in header:
        if column not in _COLUMNS:
            raise DataError(
                f"{name}, line {number}: unknown column {column!r}{did_you_mean(column, _COLUMNS)}; expected {wanted}"
            )
    for column in needed:
        if header.count(column) != 1:
            raise DataError(
                f"{name}, line {number}: {header.count(column)} columns {column!r}; expected the header {wanted}"
            )


def json_lines(text: str, faults: list[str]) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that is not blank; those that are not JSON of whole characters go to `faults`."""
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            faults.append(f"line {number}: {half} is half of a surrogate pair, which is no character; remove it")
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: not valid JSON ({error})")
        else:
            yield number, value


def _from_json_lines(text: str, name: str, faults: list[str]) -> Iterator[Example]:
    if text.lstrip().startswith("["):
        raise DataError(f"{name} is one JSON array; expected one object with text and label a line")
    for number, row in json_lines(text, faults):
        if not isinstance(row, dict):
            faults.append(f"line {number}: {type(row).__name__}, expected an object with text and label")
        elif unknown := [key for key in row if key not in _COLUMNS]:
            faults.append(f"line {number}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], _COLUMNS)}")
        elif not isinstance(row.get("text", ""), str):
            faults.append(f"line {number}: text is {row['text']!r}, not a string")
        else:
            label = row.get("label")
            if label is None or isinstance(label, str | int) or (isinstance(label, float) and math.isfinite(label)):
                written = json.dumps(label) if isinstance(label, bool) else str(label)  # true, and not True
                yield Example(number, row.get("text", ""), None if label is None else written)
            else:
                faults.append(f"line {number}: label is {label!r:.60}, not a string, a finite number, true or false")

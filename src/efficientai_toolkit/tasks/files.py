"""Task distributions on disk: JSON, or the same JSON inside an `.npz`. Pickles are refused, whatever their name."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError
from ..files import replacing

_FORMAT = "efficientai-toolkit task distribution"
_VERSION = 1
_FIELDS = {"seed": int, "endless": bool, "stream": str, "configs": list}


def write_document(path: Path, document: dict) -> None:
    """Write `document` in one piece: the file is either the old one or the new one, whole."""
    try:
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **document}, indent=1, default=_plain).encode()
    except TypeError as error:
        raise DataError(
            f"the distribution cannot be saved to {path}: a task parameter is no JSON value ({error})"
        ) from None
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, header=np.frombuffer(text, np.uint8))
        text = buffer.getvalue()
    with replacing(path) as file:
        file.write(text)


def read_document(path: Path) -> dict:
    """Read what `write_document` wrote, checked."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataNotFoundError(f"no task distribution at {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if zipfile.is_zipfile(io.BytesIO(data)):
        data = _unzip(path, data)
    elif is_pickle(data):
        raise DataError(
            f"{path} is a pickle, and loading a pickle runs whatever code is in it; "
            "save the distribution with TaskDistribution.save, which writes JSON, and load that"
        )
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not a task distribution: neither JSON nor .npz") from None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise DataError(f"{path} is not a task distribution: its field 'format' is not {_FORMAT!r}")
    if document.get("version") != _VERSION:
        raise DataError(f"{path} has version {document.get('version')!r}; this release reads version {_VERSION}")
    for name, kind in _FIELDS.items():
        if not isinstance(document.get(name), kind):
            raise DataError(f"{path} is damaged: its field {name!r} is not a {kind.__name__}")
    return document


def is_pickle(data: bytes) -> bool:
    """Whether `data` is a pickle of any protocol. Nothing in it is run."""
    if data[:1] == b"\x80":  # protocols 2 and up begin with it, and no text does
        return True
    try:
        return sum(1 for _ in pickletools.genops(data)) > 0
    except Exception:
        return False


def _unzip(path: Path, data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(is_pickle(archive.read(name)[:2]) for name in archive.namelist() if name.endswith(".pkl")):
                raise DataError(f"{path} holds a pickle, which would run code when loaded; refused")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return arrays["header"].tobytes()
    except DataError:
        raise
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise DataError(f"{path} holds pickled objects, which would run code when loaded; refused") from None
        raise DataError(f"{path} is not a task distribution: damaged or without the member 'header'") from None


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__}: {value!r}")

"""Arrays and a JSON header in one `.npz`: no pickle, written whole or not at all, and checked when read.

Members are the arrays under their flat paths (`model/layers.0.weight`, …) and `header`, UTF-8 JSON as bytes.
NumPy has no bfloat16: such an array is stored as its bits (uint16) and named in the header.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import CheckpointError, CheckpointNotFoundError
from .files import replacing

FORMAT = "efficientai-toolkit"
FORMAT_VERSION = 1
_OWN = ("format", "format_version", "bfloat16")
# A header is text about a model; one larger than this is not ours.
_MAX_HEADER = 64 << 20
# NumPy's own limit for the text before an array's data is 10,000 characters.
_MAX_PREAMBLE = 1 << 16
_KINDS = "biufc"


def write_npz(
    path: str | Path, arrays: Mapping[str, mx.array | np.ndarray], header: Mapping[str, Any] | None = None
) -> None:
    """Write `arrays` and `header` to `path`.

    The file appears by a rename within its folder after its bytes have reached the disk, so at every moment it is
    the old one or the new one, whole. The same content gives the same bytes.

    Args:
        path: of the file; its folder is made where it is missing.
        arrays: flat path → array.
        header: plain JSON; the names `format`, `format_version` and `bfloat16` are taken.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: the content cannot be: a name twice, a header that is not JSON.
    """
    path = Path(path)
    taken = [name for name in _OWN if name in (header or {})]
    if taken or "header" in arrays:
        raise CheckpointError(f"{path}: the name {(taken or ['header'])[0]!r} belongs to the file format")
    halves = [name for name, array in arrays.items() if _is_bfloat16(array)]
    try:
        text = json.dumps(
            {"format": FORMAT, "format_version": FORMAT_VERSION, "bfloat16": halves, **(header or {})},
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header is not plain JSON: {error}") from error
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "header", np.frombuffer(text.encode(), np.uint8))
        for name, array in arrays.items():
            _add(archive, name, _to_numpy(array))


def read_npz(path: str | Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(arrays by flat path, header) of a file that `write_npz` made.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is cut short, damaged, not one of ours, or of a later version; the message says which.
    """
    path = Path(path)
    members, header = _read(path)
    halves = set(header.pop("bfloat16", ()))
    arrays = {
        name: mx.array(value).view(mx.bfloat16) if name in halves else mx.array(value)
        for name, value in members.items()
    }
    return arrays, header


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone."""
    path = Path(path)
    with _opened(path) as archive:
        return _header(archive, path)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with _opened(path) as archive:
        header = _header(archive, path)
        names = [info.filename for info in archive.infolist() if info.filename != "header.npy"]
        if len(set(names)) != len(names) or not all(name.endswith(".npy") for name in names):
            raise CheckpointError(f"{path} is damaged: its list of members is not one that was written here")
        return {name.removesuffix(".npy"): _member(archive, name, path) for name in names}, header


@contextlib.contextmanager
def _opened(path: Path):
    """The archive at `path`; whatever its bytes can do to the reader becomes one sentence."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start != b"PK\x03\x04":
                raise CheckpointError(_foreign(path, start))
            with zipfile.ZipFile(file) as archive:
                yield archive
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder; name a checkpoint (.npz) file") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,  # includes UnicodeError, and what NumPy says of a broken preamble
        KeyError,
        NotImplementedError,  # a compression or zip version that zipfile does not know
        RuntimeError,  # an encryption bit that damage has set
        RecursionError,
        OverflowError,
        MemoryError,
        SyntaxError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} is cut short or damaged ({reason.splitlines()[0][:120]}); use another checkpoint of the run"
        ) from error


def _foreign(path: Path, start: bytes) -> str:
    if not start:
        return f"{path} is empty, not a checkpoint"
    kind = "a pickle, which this toolkit never loads" if start[:1] == b"\x80" else "not a checkpoint (.npz)"
    return f"{path} is {kind}; checkpoints are made by `train` and by `save`"


def _header(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    if "header.npy" not in archive.namelist():
        raise CheckpointError(
            f"{path} is a zip file but not a checkpoint of this toolkit (it has no header); "
            "checkpoints are made by `train` and by `save`"
        )
    if archive.getinfo("header.npy").file_size > _MAX_HEADER:
        raise CheckpointError(f"{path} is damaged: its header claims more than {_MAX_HEADER >> 20} MiB")
    header = json.loads(_member(archive, "header.npy", path).tobytes().decode())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this toolkit: its header is of another format")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this release reads version {FORMAT_VERSION}; "
            "install the release that wrote it"
        )
    return header


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One member as an array. Its sizes are compared before anything is allocated, so no file can claim much."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(f"{path} is damaged or foreign: {name} is compressed, and checkpoints never are")
    if info.file_size > path.stat().st_size:
        raise CheckpointError(f"{path} is cut short or damaged: {name} claims more bytes than the file has")
    data = archive.read(info)  # checks the CRC
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise CheckpointError(f"{path} is foreign: {name} is an array of .npy version {version}")
    shape, fortran, dtype = read(stream, max_header_size=_MAX_PREAMBLE)
    if dtype.hasobject or dtype.kind not in _KINDS:
        raise CheckpointError(
            f"{path}: {name} holds {'pickled objects, which are never loaded' if dtype.hasobject else dtype}; "
            "a checkpoint holds numbers only"
        )
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise CheckpointError(f"{path} is damaged: {name} does not have as many numbers as it says")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # A fixed date: the same content gives the same bytes.
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    with archive.open(info, "w", force_zip64=array.nbytes >= 1 << 31) as member:
        np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def _is_bfloat16(array: mx.array | np.ndarray) -> bool:
    return isinstance(array, mx.array) and array.dtype == mx.bfloat16


def _to_numpy(array: mx.array | np.ndarray) -> np.ndarray:
    if isinstance(array, mx.array):
        array = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    if array.dtype.kind not in _KINDS:
        raise CheckpointError(f"an array of {array.dtype} cannot be saved; a checkpoint holds numbers only")
    return np.asarray(array, order="C")

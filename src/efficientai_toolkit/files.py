"""Files that are written whole or not at all, and JSON for everything a metric can be."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import DataError, DataNotFoundError, OutputError

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_REMEDIES = {**dict.fromkeys(_FULL, "free some space"), errno.ENAMETOOLONG: "give a shorter name"}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well.

    It appears by a rename within its folder after its bytes have reached the disk, so at every moment `path` is
    the old file or the new one, whole. Its folder is made where it is missing.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                _to_disk(file.fileno())
            with contextlib.suppress(OSError):  # mkstemp's 0600 would hide the file from one's group
                os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an `OutputError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "name a folder that can be written")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def check_folder(folder: str | Path) -> None:
    """See that `folder`, which need not be there yet, can be written; nothing is made.

    Raises:
        OutputError: it cannot.
    """
    nearest = folder = Path(folder)
    with writing(folder):
        while True:
            try:
                os.lstat(nearest)
                break
            except FileNotFoundError:
                nearest = nearest.parent
        fault = 0 if nearest.is_dir() else errno.ENOTDIR
        fault = fault or (0 if os.access(nearest, os.W_OK | os.X_OK) else errno.EACCES)
        if fault:
            raise OSError(fault, os.strerror(fault))


def disk_is_full(error: OutputError) -> bool:
    """Whether it was for want of space that a file could not be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL


def link(path: str | Path, target: str | Path) -> bool:
    """Make `path` a symbolic link to `target`, in place of the link that stood there, atomically.

    A file or folder that is no link, and a link to a folder of another name, are somebody else's and are left alone.

    Returns:
        whether it was done.

    Raises:
        OutputError: the folder cannot be written.
    """
    path, target = Path(path), Path(target)
    if path.is_symlink():
        if Path(os.readlink(path)).name != target.name:
            return False
    elif path.exists():
        return False
    with writing(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()), target_is_directory=True)
        os.replace(temporary, path)
    return True


def write_text(path: str | Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically; see `jsonable` for what it may hold."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in the JSON file at `path`; a missing or damaged file is a `DataError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataNotFoundError(f"{path} is not there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: arrays become lists, paths strings, floats that are not finite `None`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and MLX, arrays and scalars
        return jsonable(value.tolist())
    return str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(handle: int) -> None:
    """`os.fsync`; that of a Mac leaves the bytes in the drive's own memory, so it is told to write them."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # not every file system can
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            _to_disk(handle)
        finally:
            os.close(handle)

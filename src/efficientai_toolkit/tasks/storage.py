"""Where data sets lie, how they get there, and the cache of decoded arrays."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..errors import DataError, DataNotFoundError, OutputError
from .seeding import stable_seed

_TIMEOUT = 20  # seconds without an answer


def user_cache() -> Path:
    """The user's cache folder of this toolkit."""
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "efficientai-toolkit"


def data_root(data_dir: str | Path | None = None) -> Path:
    """The parent of all data sets: `data_dir`, else `$EFFICIENTAI_DATA_DIR`, else the user's cache folder."""
    given = data_dir or os.environ.get("EFFICIENTAI_DATA_DIR")
    if not given:
        return user_cache()
    root = Path(given).expanduser()
    if not root.is_dir():
        raise DataNotFoundError(f"the data folder {root} is not there; create it, or name another with --data-dir")
    return root


def fetch(root: Path, name: str, url: str, *, sha256: str | None = None, md5: str | None = None, what: str) -> Path:
    """The file `name` below `root` or the user's cache; where it is in neither, downloaded from `url` to `root`.

    Progress goes to stderr. A file that is there already is taken as it is.

    Args:
        root, name, url: see above.
        sha256: of what is downloaded; something else is not kept.
        md5: the same, where nothing better was published: against damage, not against malice.
        what: names the data set in errors.
    """
    kind, expected = ("MD5", md5) if md5 else ("SHA-256", sha256)
    path = root / name
    for place in (path, user_cache() / name):
        if place.is_file():
            return place
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"{what} is not at {path} and cannot be downloaded there: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            found = _download(url, file, path.name, kind)
        if expected and found != expected:
            raise DataError(
                f"{url} has changed, or came damaged: {kind} {found}, expected {expected}; nothing was kept"
            )
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "reason", None) or error
        raise DataNotFoundError(
            f"{what} is not at {path}, and downloading it failed ({reason}); "
            f"put the file from {url} there, or name the folder that has it with --data-dir"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _download(url: str, file, name: str, kind: str) -> str:
    digest = hashlib.new(kind.replace("-", "").lower(), usedforsecurity=kind != "MD5")
    done, shown = 0, -1
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 18):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            tenth = 10 * done // size if size else done >> 23
            if tenth != shown:
                shown = tenth
                total = f" of {size / 1e6:.1f}" if size else ""
                print(f"downloading {name}: {done / 1e6:.1f}{total} MB", file=sys.stderr, flush=True)
    if size and done != size:
        raise OSError(f"the connection closed after {done} of {size} bytes")
    return digest.hexdigest()


def cached(name: str, sources: Iterable[Path], build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`build()`, kept in the user's cache for as long as the files it was made from stay as they are.

    A cache that cannot be read is built again, one that cannot be written is done without.

    Raises:
        DataError: a source is not there, as the target of a link may be.
    """
    stamp = [_stamp(path) for path in sources]
    path = user_cache() / "arrays" / f"{name}-{stable_seed(stamp):016x}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    arrays = build()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return arrays


def _stamp(path: Path) -> tuple[str, int, int]:
    """What changes with the file at `path`."""
    try:
        found = path.stat()
    except OSError as error:
        target = f" (it is a link to {path.readlink()})" if path.is_symlink() else ""
        raise DataError(f"cannot read {path}: {error.strerror}{target}") from None
    return str(path.resolve()), found.st_size, found.st_mtime_ns

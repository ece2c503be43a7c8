"""The frozen part of an encoder or language model below its first adapted layer, computed once per example."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..devices import gpu_kind
from ..errors import ModelError
from .bert import Encoder
from .language_model import LanguageModel

Cacheable = (Encoder, LanguageModel)
_KEEP = 0.75  # of the disk's share, once it is full
_FORMAT = 2  # of the hidden states on disk: another one where a model of this toolkit computes others than before


def frozen_layers(model: Encoder | LanguageModel) -> int:
    """How many layers lie below everything that is trained or adapted; 0 where the embeddings are.

    Of a language model at most all but the last; 0 where going on from the middle is not exact for it, or where
    something is trained that is in no block (a final norm, say).
    """
    lowest = _untouched(model)
    return 0 if isinstance(model, LanguageModel) and lowest and not model.can_resume(lowest) else lowest


def _untouched(model: Encoder | LanguageModel) -> int:
    """`frozen_layers`, if going on from the middle is exact."""
    causal = isinstance(model, LanguageModel)
    stack = f"lm.{model.body_path}.{model.stack}".replace("..", ".") if causal else "layers"
    lowest = len(model.layers) - causal
    flat: Any = tree_flatten(model.trainable_parameters())
    busy = [path for path, _ in flat if not path.startswith("head.")]
    busy += [path for path, module in model.named_modules() if getattr(module, "active", ())]
    for path in busy:
        layer = re.match(rf"{re.escape(stack)}\.(\d+)\.", f"{path}.")
        if layer:
            lowest = min(lowest, int(layer[1]))
        elif path.startswith("lm." if causal else "embeddings") and not (causal and model.is_output(path)):
            return 0
    return lowest


class FrozenPrefix:
    """ids (…, N, L) → what `model.prefix` gives (…, N, L, d + 1), each example computed once.

    Made for a model whose adapters sit in its upper layers: the model then takes the result in place of the ids, with
    the same losses, and every inner step costs the upper layers only. Keys are an example's tokens without pads;
    hidden states of pads come back as zeros, which the mask keeps out. Where frozen weights are replaced, or something
    acts further down, it is an error; a weight that is written in place (`weight[0] = 1`, `weight += 1`) is not seen.

    Args:
        model: an adapted encoder or language model; `model.resumes_at` is set.
        folder: keep the hidden states on disk too, in a subfolder named after the frozen weights, so that another
            model never reads them. Processes may share it. Where it cannot be written, memory alone is used, and a
            warning says so. It may be deleted at any time.
        max_bytes: of memory; the least recently used go first.
        max_disk_bytes: of `folder`, over all models; the oldest files go first. Looked at when this process first
            writes there, and again whenever it has written an eighth of that: a little more may lie there meanwhile.

    Raises:
        ModelError: the first layer or the embeddings are trained: nothing is frozen below. When called: the model is no
            longer as it was.

    >>> prefix = FrozenPrefix(model)
    >>> episodes = prefix.episodes(tasks.sample_batch(4))
    """

    def __init__(
        self,
        model: Encoder | LanguageModel,
        folder: str | Path | None = None,
        *,
        max_bytes: int = 2**31,
        max_disk_bytes: int = 2**31,
    ):
        self.layers = frozen_layers(model)
        if not self.layers:
            raise ModelError(
                "nothing is frozen below the first adapted layer; adapt upper layers only, as 'layers.[45].*'"
            )
        model.resumes_at = self.layers
        self.model, self.max_bytes, self.max_disk_bytes = model, max_bytes, max_disk_bytes
        self.computed = 0
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._weights = dict(self._below())  # kept alive, so that no new array has the identity of an old one
        self._root = None if folder is None else Path(folder)
        self._folder = None if folder is None else Path(folder) / self._fingerprint()
        self._writable = True

    def __call__(self, ids: mx.array) -> mx.array:
        self._check()
        tokens = np.array(ids)
        shape, rows = tokens.shape, tokens.reshape(-1, tokens.shape[-1])
        pad = self.model.config.pad_id
        lengths = [int(np.flatnonzero(row != pad)[-1]) + 1 if (row != pad).any() else 1 for row in rows]
        keys = [row[:length].astype(np.int32).tobytes() for row, length in zip(rows, lengths, strict=True)]
        self._compute({key: row[:length] for key, row, length in zip(keys, rows, lengths, strict=True)})
        out = np.zeros((len(rows), shape[-1], self.model.config.hidden_size + 1), dtype=np.float32)
        for i, key in enumerate(keys):
            out[i, : lengths[i]] = self._rows[key]
            self._rows.move_to_end(key)
        self._trim()
        return mx.array(out.reshape(*shape, -1))

    def episodes(self, episodes: Iterable[Any]) -> list[Any]:
        """Episodes (stacked or not) with their ids replaced."""
        return [
            episode._replace(support_x=self(episode.support_x), query_x=self(episode.query_x)) for episode in episodes
        ]

    def _compute(self, wanted: dict[bytes, np.ndarray]) -> None:
        missing = {key: row for key, row in wanted.items() if key not in self._rows and not self._read(key)}
        by_length = sorted(missing.items(), key=lambda item: len(item[1]))
        for start in range(0, len(by_length), 64):
            batch = by_length[start : start + 64]
            width = max(len(row) for _, row in batch)
            ids = np.full((len(batch), width), self.model.config.pad_id, dtype=np.int32)
            for i, (_, row) in enumerate(batch):
                ids[i, : len(row)] = row
            hidden = np.array(self.model.prefix(mx.array(ids), self.layers).astype(mx.float32))
            for i, (key, row) in enumerate(batch):
                self._keep(key, hidden[i, : len(row)].copy())
                self._write(key)
        self.computed += len(missing)

    def _keep(self, key: bytes, value: np.ndarray) -> None:
        self._rows[key] = value
        self._bytes += value.nbytes

    def _trim(self) -> None:
        while self._bytes > self.max_bytes and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes

    def _file(self, key: bytes) -> Path:
        name = hashlib.sha256(key).hexdigest()
        assert self._folder is not None
        return self._folder / name[:2] / f"{name}.npy"

    def _read(self, key: bytes) -> bool:
        """Keep the disk's hidden states of `key`; False where there are none, or where the file is damaged."""
        if self._folder is None:
            return False
        tokens = np.frombuffer(key, np.int32)
        shape = (len(tokens), self.model.config.hidden_size + 1)
        header, size = _header(shape), 4 * shape[0] * shape[1]
        try:
            with self._file(key).open("rb") as opened:
                data = opened.read(len(header) + size + 1)
        except OSError:
            return False
        if len(data) != len(header) + size or not data.startswith(header):
            return False
        value = np.frombuffer(data, np.float32, offset=len(header)).reshape(shape)
        if not (np.isfinite(value).all() and np.array_equal(value[:, -1], tokens != self.model.config.pad_id)):
            return False
        self._keep(key, value)
        return True

    def _write(self, key: bytes) -> None:
        if self._root is None or not self._writable:
            return
        file, part = self._file(key), None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=file.parent, suffix=".npy")
            with os.fdopen(handle, "wb") as opened:
                np.save(opened, self._rows[key])
            os.replace(part, file)
        except OSError as error:
            if part:
                Path(part).unlink(missing_ok=True)
            if part and isinstance(error, FileNotFoundError):
                return  # the folder was cleared meanwhile; the next file makes it again
            self._writable = False
            _warn_unwritable(self._root, error.strerror)
            return
        written = _written.get(str(self._root), self.max_disk_bytes) + self._rows[key].nbytes
        if written > self.max_disk_bytes // 8:
            _trim_folder(self._root, self.max_disk_bytes)
            written = 0
        _written[str(self._root)] = written

    def _check(self) -> None:
        """Refuse to answer for a model that is not as it was."""
        if _untouched(self.model) < self.layers or self.model.resumes_at != self.layers:
            raise ModelError(
                f"the model's first {self.layers} layers were below all that acts or is trained when this prefix was "
                "made, and it is not so now; make a new one, or activate what was active"
            )
        now = dict(self._below())
        if now.keys() != self._weights.keys() or any(now[path] is not own for path, own in self._weights.items()):
            raise ModelError("the frozen weights have changed since this prefix was made; make a new one")

    def _below(self) -> list[tuple[str, mx.array]]:
        if isinstance(self.model, LanguageModel):
            return self.model.below(self.layers)
        flat: Any = tree_flatten(
            {
                "embeddings": self.model.embeddings.parameters(),
                "layers": [m.parameters() for m in self.model.layers[: self.layers]],
            }
        )
        return flat

    def _fingerprint(self) -> str:
        """Names the frozen weights, the configuration, the number of layers, a foreign model's release and a GPU."""
        described = (_FORMAT, self.model.config, self.layers)
        if isinstance(self.model, LanguageModel):
            module = type(self.model.lm).__module__
            release = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
            described = (*described, module, release, getattr(self.model.lm, "args", None))
        if mx.default_device() == mx.gpu:  # whose products are rounded otherwise
            described = (*described, gpu_kind(), os.environ.get("MLX_ENABLE_TF32", "1"))
        digest = hashlib.sha256(repr(described).encode())
        for path, array in self._below():
            digest.update(f"{path}{array.shape}{array.dtype}".encode())
            packed = mx.issubdtype(array.dtype, mx.integer)  # quantised: float32 would not hold all bits
            digest.update(np.array(array if packed else array.astype(mx.float32)).tobytes())
        return digest.hexdigest()[:32]


def _header(shape: tuple[int, int]) -> bytes:
    """What `np.save` writes before the numbers of a float32 array of this shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


_written: dict[str, int] = {}  # folder → bytes that this process wrote there since it last looked at all of it


@functools.cache  # once a process and folder
def _warn_unwritable(folder: Path, reason: str | None) -> None:
    logging.getLogger(__name__).warning(
        "hidden states cannot be kept in %s (%s), so they are kept in memory alone; XDG_CACHE_HOME names another place",
        folder,
        reason,
    )


def _trim_folder(folder: Path, limit: int) -> None:
    """Delete the oldest files of `folder` until `_KEEP` of `limit` is left, where it holds more than `limit`.

    Other processes may write and delete there at the same time: what is gone already does not matter.
    """
    files = []
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names if name.endswith(".npy")):
            with contextlib.suppress(OSError):
                about = file.stat()
                files.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in files)
    if total <= limit:
        return
    for _, size, file in sorted(files):
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size
        if total <= _KEEP * limit:
            return

"""The frozen part of an encoder below its first adapted layer, computed once per example and reused."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import ModelError, OutputError
from .bert import Encoder


def frozen_layers(model: Encoder) -> int:
    """How many layers lie below everything that is trained or adapted; 0 where the embeddings are."""
    lowest = len(model.layers)
    flat: Any = tree_flatten(model.trainable_parameters())
    busy = [path for path, _ in flat if not path.startswith("head.")]
    busy += [path for path, module in model.named_modules() if getattr(module, "active", ())]
    for path in busy:
        layer = re.match(r"layers\.(\d+)\.", f"{path}.")
        if layer:
            lowest = min(lowest, int(layer[1]))
        elif path.startswith("embeddings"):
            return 0
    return lowest


class FrozenPrefix:
    """ids (…, N, L) → what `model.prefix` gives (…, N, L, d + 1), each example computed once.

    Made for a model whose adapters sit in its upper layers: the model then takes the result in place of the ids, with
    the same losses, and every inner step costs the upper layers only. Keys are an example's tokens without pads;
    hidden states of pads come back as zeros, which the mask keeps out.

    Args:
        model: an adapted encoder; `model.resumes_at` is set.
        folder: keep the hidden states on disk too, in a subfolder named after the frozen weights, so that another
            model never reads them.
        max_bytes: of memory; the least recently used go first.

    Raises:
        ModelError: the first layer or the embeddings are trained: nothing is frozen below.

    >>> prefix = FrozenPrefix(model)
    >>> episodes = prefix.episodes(tasks.sample_batch(4))
    """

    def __init__(self, model: Encoder, folder: str | Path | None = None, *, max_bytes: int = 2**31):
        self.layers = frozen_layers(model)
        if not self.layers:
            raise ModelError(
                "nothing is frozen below the first adapted layer; adapt upper layers only, as 'layers.[45].*'"
            )
        model.resumes_at = self.layers
        self.model, self.max_bytes = model, max_bytes
        self.computed = 0
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._weights = self._frozen()
        self._folder = None if folder is None else Path(folder) / self._fingerprint()

    def __call__(self, ids: mx.array) -> mx.array:
        if self._frozen() != self._weights:
            raise ModelError("the frozen weights have changed since this prefix was made; make a new one")
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
        if self._folder is None:
            return False
        shape = (len(key) // 4, self.model.config.hidden_size + 1)
        try:
            value = np.load(self._file(key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        if value.shape != shape:
            return False
        self._keep(key, value)
        return True

    def _write(self, key: bytes) -> None:
        if self._folder is None:
            return
        file = self._file(key)
        part = file.with_suffix(f".{os.getpid()}.part.npy")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(part, self._rows[key])
            os.replace(part, file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error}") from error

    def _frozen(self) -> dict[str, int]:
        """The identity of every frozen array below; MLX never changes an array in place."""
        return {path: id(array) for path, array in self._below()}

    def _below(self) -> list[tuple[str, mx.array]]:
        flat: Any = tree_flatten(
            {
                "embeddings": self.model.embeddings.parameters(),
                "layers": [m.parameters() for m in self.model.layers[: self.layers]],
            }
        )
        return flat

    def _fingerprint(self) -> str:
        """Names the frozen weights, the configuration, and the number of layers."""
        digest = hashlib.sha256(repr((self.model.config, self.layers)).encode())
        for path, array in self._below():
            digest.update(path.encode() + repr(array.shape).encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
        return digest.hexdigest()[:32]

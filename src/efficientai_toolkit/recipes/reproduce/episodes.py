"""Long measurements over episodes, block by block: they tell how far they are, and go on where they were stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ToolkitError
from ...files import read_json, write_json

if TYPE_CHECKING:
    from ..intents import Episodes

BLOCK, EVERY = 10, 5.0  # episodes at once; seconds between two lines, and two writings


class EpisodeLog:
    """Accuracies of episodes in a file, until all are measured.

    Args:
        file: where they are kept.
        protocol: what decides them, as JSON; a file of another protocol is begun anew.
        say: is told how far it is.
    """

    def __init__(self, file: Path, protocol: Mapping[str, Any], say: Callable[[str], None]):
        self._file, self._protocol, self._say = file, protocol, say
        self._kept: dict[str, dict[str, Any]] = {}
        try:
            found = read_json(file)
            if found["protocol"] == protocol:
                self._kept = found["kept"]
        except (ToolkitError, KeyError, TypeError):  # none yet, or not a log
            pass

    def measure(
        self, name: str, measure: Callable[[Episodes], np.ndarray], episodes: Episodes
    ) -> tuple[np.ndarray, float]:
        """`measure` of all `episodes`, (episodes,), from where the log under `name` ends, and the seconds it took."""
        kept, count = self._kept.setdefault(name, {"accuracies": [], "seconds": 0.0}), len(episodes.support)
        done: list[float] = kept["accuracies"]
        told = time.perf_counter()
        while (first := len(done)) < count:
            begin, block = time.perf_counter(), slice(first, first + BLOCK)
            some = episodes._replace(support=episodes.support[block], query=episodes.query[block])
            done += np.asarray(measure(some)).tolist()
            kept["seconds"] += time.perf_counter() - begin
            if time.perf_counter() - told >= EVERY or len(done) == count:
                told = time.perf_counter()
                write_json(self._file, {"protocol": self._protocol, "kept": self._kept})
                self._say(f"{name}: {len(done)} of {count} episodes, accuracy {np.mean(done):.3f}")
        return np.array(done), kept["seconds"]

    def close(self) -> None:
        """All is in a record: the file is of no more use."""
        self._file.unlink(missing_ok=True)

"""Standard output and error whose reader may go away: a pipe that is closed, a terminal that is gone."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)  # of a pipe; of a terminal


class Unstoppable(io.FileIO):
    """A file that goes on as `os.devnull` when nobody reads it any more, so that work is not lost over its words.

    Its descriptor is the process's own, so child processes write there, too.
    """

    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def go_on_unread() -> None:
    """Make standard output and error `Unstoppable`; no text is lost, either, where their encoding is not UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the process (`>&-`)
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8"))
            continue
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):  # the process's own
            stream.flush()
            raw: Any = Unstoppable(stream.fileno(), "wb", closefd=False)
            wrapper = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),  # the former by `python -u`
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapper)

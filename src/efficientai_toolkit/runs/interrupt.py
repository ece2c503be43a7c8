"""Ctrl-C as a wish: work ends where it can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within it the first Ctrl-C (SIGTERM, closed terminal) only sets the event; the second is a KeyboardInterrupt."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # `nohup` ignores it, and that stays
        numbers.append(hangup)
    held = {number: signal.signal(number, note) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)

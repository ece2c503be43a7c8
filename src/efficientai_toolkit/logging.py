"""A logger for scripts and runs: standard error, and a file where a folder is named."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from .errors import ConfigurationError, OutputError

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def setup_logger(
    name: str = "efficientai_toolkit",
    log_dir: str | Path | None = None,
    level: str | int = "INFO",
    *,
    console: bool = True,
) -> logging.Logger:
    """The logger `name`, writing to standard error and, where `log_dir` is given, to `log_dir/NAME.log`.

    `console=False` leaves standard error out. Calling it again replaces what it set up before, so a line is never
    written twice.

    Raises:
        ConfigurationError: `level` is not a logging level.
        OutputError: the file cannot be written.
    """
    if isinstance(level, str):
        known = logging.getLevelNamesMapping()
        if level.upper() not in known:
            raise ConfigurationError(f"unknown log level {level!r}; known: DEBUG, INFO, WARNING, ERROR, CRITICAL")
        level = known[level.upper()]
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if console else []
    if log_dir is not None:
        path = Path(log_dir) / f"{name}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}; name another log_dir") from error
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    for old in [handler for handler in logger.handlers if getattr(handler, "_set_up", False)]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler._set_up = True  # type: ignore[attr-defined]
        logger.addHandler(handler)
    return logger

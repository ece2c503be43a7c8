"""What a command prints for its user to type next, and how it ends by Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from . import PREFIX


def command(name: str, *arguments: Any, **options: Any) -> str:
    """A line for a shell, whatever spaces are in its paths.

    Args:
        name: of `COMMANDS`.
        arguments: without a flag, after the name.
        options: `base_name="x y"` becomes `--base-name 'x y'`, True the flag alone; None and False are left out.

    >>> command("predict", adapter="my folder", input="texts.csv")
    "efficientai-toolkit meta-learning-peft:predict --adapter 'my folder' --input texts.csv"
    """
    words = ["efficientai-toolkit", PREFIX + name, *map(str, arguments)]
    for option, value in options.items():
        if value is not None and value is not False:
            words += ["--" + option.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(words)


@contextlib.contextmanager
def goes_on_by(line: str) -> Iterator[None]:
    """Ctrl-C within it ends the command with exit code 130, and says which line goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted; what was finished is saved. Go on with:\n  {line}", file=sys.stderr)
        raise SystemExit(130) from None

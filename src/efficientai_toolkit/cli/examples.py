"""Files that users give to `adapt`, `predict` and `finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def support_of(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a file of examples, at least two different labels."""
    from ..tasks.labelled import read_examples, require_classes

    examples = read_examples(path)
    require_classes(examples, str(path))
    return [example.text for example in examples], [str(example.label) for example in examples]


def texts_of(path: str) -> tuple[list[str], list[str] | None]:
    """Texts of a file, or of standard input where it is "-" (one a line), and labels where it has them."""
    from ..tasks.labelled import parse_examples, read_examples

    if path == "-":
        examples = parse_examples(sys.stdin.buffer.read(), "standard input", "", labelled=False)
    else:
        examples = read_examples(path, labelled=False)
    labels = [example.label for example in examples]
    return [example.text for example in examples], None if None in labels else [str(label) for label in labels]


def background_of(path: Path | None, data_dir: Path | None, texts: bool) -> Any:
    """Inputs that fit no label: of a file, else CLINC150's out-of-scope queries for training and validation."""
    from ..errors import ConfigurationError, DataNotFoundError

    if path is not None:
        return texts_of(str(path))[0]
    if not texts:
        raise ConfigurationError("--none-of-these needs --background, a file of inputs that fit no label")
    from ..tasks.intents import out_of_scope
    from ..tasks.storage import data_root

    try:
        parts = out_of_scope(data_root(data_dir))
    except DataNotFoundError as error:
        raise DataNotFoundError(
            f"--none-of-these needs texts that fit no label: give them with --background ({error})"
        ) from None
    return parts["train"] + parts["val"]

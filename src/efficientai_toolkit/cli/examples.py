"""Files that users give to `adapt`, `predict` and `finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def backbone_of(checkpoint: Path) -> str:
    """The backbone's name in a checkpoint."""
    from ..checkpoint import read_header
    from ..runs.build import checkpoint_file

    config = read_header(checkpoint_file(checkpoint)).get("config") or {}
    return config.get("model", {}).get("backbone", "")


def support_of(path: Path, texts: bool) -> tuple[Any, list[str]]:
    """Inputs and labels of a file of examples, at least two different labels among texts."""
    if texts:
        from ..tasks.labelled import read_examples, require_classes

        examples = read_examples(path)
        require_classes(examples, str(path))
        return [example.text for example in examples], [str(example.label) for example in examples]
    from ..tasks.numbers import read_numbers

    x, labels = read_numbers(path)
    return x, labels or []


def inputs_of(path: str, texts: bool) -> tuple[Any, list[str] | None]:
    """Inputs of a file, or of standard input where it is "-" (one text a line), and labels where it has them."""
    from ..errors import DataError
    from ..tasks.labelled import parse_examples, read_examples
    from ..tasks.numbers import read_numbers

    if not texts:
        if path == "-":
            raise DataError("--input -: only texts can come from standard input; give a .csv or .npz file")
        return read_numbers(path, labelled=False)
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
        return inputs_of(str(path), texts)[0]
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

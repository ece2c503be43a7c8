"""Files that users give to `adapt`, `predict` and `finetune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def support_of(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a file of examples, at least two different labels."""
    from ..tasks.labelled import read_examples, require_classes

    _refuse_folder(path)
    examples = read_examples(path)
    require_classes(examples, str(path))
    texts, labels = [example.text for example in examples], [str(example.label) for example in examples]
    warn_of_labels(texts, labels, str(path))
    return texts, labels


def warn_of_labels(texts: Sequence[Any], labels: Sequence[str], name: str) -> None:
    """Say it where one text has several labels: mostly a slip in the labelling, and nothing that can be learned."""
    found: dict[Any, list[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        known = found.setdefault(text, [])
        if label not in known:
            known.append(label)
    several = [(text, known) for text, known in found.items() if len(known) > 1]
    if several:
        text, known = several[0]
        more = f" (and {len(several) - 1} more)" if len(several) > 1 else ""
        print(f"Warning: {name} has {text!r:.60} as {' and as '.join(known)}{more}", file=sys.stderr)


def _refuse_folder(path: str | Path) -> None:
    from ..errors import DataError

    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; the model reads texts: give a file of them (.csv, .tsv or .jsonl)")


def texts_of(path: str) -> tuple[list[str], list[str] | None]:
    """Texts of a file, or of standard input where it is "-" (one a line), and labels where it has them."""
    from ..tasks.labelled import parse_examples, read_examples

    if path == "-":
        examples = parse_examples(sys.stdin.buffer.read(), "standard input", "", labelled=False)
    else:
        _refuse_folder(path)
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

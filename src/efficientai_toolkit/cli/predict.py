"""`predict`: the label of each input by what `adapt` learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Json, echo_json


def predict(
    adapter: Annotated[Path, typer.Option("--adapter", help="A folder that `adapt` wrote.")],
    input: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            help="Texts: a file (.csv, .jsonl, or a text a line), or - for standard input; numbers: .csv or .npz, or - "
            "for a CSV on standard input; images: a folder of them, one image, or .npz.",
        ),
    ],
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Score below which nothing fits, the log of the sum of exp(logits) (default: as calibrated). --json "
            "shows each input's, `adapt --none-of-these` the calibrated one.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model, where it has moved.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """One line an input: (an image's file,) its label and the label's probability, with tabs between them."""
    import math
    import sys

    import numpy as np

    from ..devices import select_device
    from ..errors import ConfigurationError, DataError
    from ..runs.adapted import AdaptedTask, targets
    from ..runs.exchange import refuse_foreign
    from ..runs.loaded import read_arrays
    from .examples import texts_of

    if threshold is not None and math.isnan(threshold):  # no score is below it
        raise ConfigurationError("--threshold nan: expected a number; with inf nothing fits, with -inf everything")
    select_device(device)
    refuse_foreign(adapter)
    adapted = AdaptedTask.load(adapter, source=base)
    if threshold is not None:
        adapted.threshold = threshold
    regression = adapted.labels is None
    if adapted.reads_texts:
        inputs, truth = texts_of(input)
    elif input == "-" and adapted.kind == "images":
        raise DataError("--input -: images cannot come from standard input; give a folder of them, one image, or .npz")
    else:
        columns = adapted.columns
        inputs, truth = read_arrays(input, adapted.kind, labelled=False, columns=columns, regression=regression)
    if regression:
        expected = None if truth is None else targets(truth)
        outputs = adapted.outputs(inputs)
        for row in np.array(outputs).tolist():
            echo_json({"value": row}) if json else print("\t".join(f"{value:.6g}" for value in row))
        if expected is not None:
            error = float(np.square(np.array(outputs - expected)).mean())
            print(f"mean squared error {error:.4g} over {len(expected)} rows", file=sys.stderr)
        return
    found = adapted.answers(inputs)
    for each, answer in zip(inputs, found, strict=True):
        row = {"file": _shown(each, input)} if isinstance(each, Path) else {}
        if json:
            row |= answer._asdict()
            if adapted.threshold is None:
                del row["score"]
            echo_json(row)
            continue
        none = answer.label is None
        cells = [*row.values(), "(none of these)" if none else answer.label, f"{answer.probability:.4f}"]
        print("\t".join([*cells, f"score {answer.score:.3f}"] if none else cells))
    if truth is not None:
        right = [answer.label == true for answer, true in zip(found, truth, strict=True) if true]  # "" is no label
        if right:
            print(f"{sum(right)} of {len(right)} as labelled ({100 * sum(right) / len(right):.1f} %)", file=sys.stderr)


def _shown(file: Path, given: str) -> str:
    """A file's path in the folder that was given; or its name; without what would end a line or a field of it."""
    inside = file.name if file == Path(given) else file.relative_to(given).as_posix()
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in inside)

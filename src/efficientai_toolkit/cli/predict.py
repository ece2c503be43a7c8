"""`predict`: the label of each text by what `adapt` learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Json, echo_json


def predict(
    adapter: Annotated[Path, typer.Option("--adapter", help="A folder that `adapt` wrote.")],
    input: Annotated[
        str, typer.Option("--input", "-i", help="A file (.csv, .jsonl, or a text a line), or - for standard input.")
    ],
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score below which nothing fits (default: as calibrated).")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model, where it has moved.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """One line an input: its label and the label's probability, with a tab between them."""
    import sys

    import numpy as np

    from ..devices import select_device
    from ..runs.adapted import AdaptedTask
    from .examples import inputs_of

    select_device(device)
    adapted = AdaptedTask.load(adapter, source=base)
    if threshold is not None:
        adapted.threshold = threshold
    inputs, truth = inputs_of(input, adapted.reads_texts)
    if adapted.labels is None:
        for row in np.array(adapted.outputs(inputs)).tolist():
            echo_json({"value": row}) if json else print("\t".join(f"{value:.6g}" for value in row))
        return
    found = adapted.predict(inputs)
    for label, probability in found:
        if json:
            echo_json({"label": label, "probability": probability})
        else:
            print(f"{'(none of these)' if label is None else label}\t{probability:.4f}")
    if truth is not None:
        right = [label == true for (label, _), true in zip(found, truth, strict=True) if true]  # "" is no label
        if right:
            print(f"{sum(right)} of {len(right)} as labelled ({100 * sum(right) / len(right):.1f} %)", file=sys.stderr)

"""`adapt`: a meta-trained checkpoint and a few examples of one's own → a small folder that `predict` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Checkpoint, DataDir, Device, Json, echo_json


def adapt(
    checkpoint: Checkpoint,
    support: Annotated[
        Path,
        typer.Option(
            "--support",
            help="Your examples: .csv or .jsonl of text,label; numbers: .csv, or .npz of x, y; images: a folder with a "
            "folder of them for each label, or .npz.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    steps: Annotated[int | None, typer.Option("--steps", help="Inner steps (default: as trained).")] = None,
    none_of_these: Annotated[
        bool, typer.Option("--none-of-these", help="Set a threshold below which nothing fits.")
    ] = False,
    background: Annotated[
        Path | None,
        typer.Option("--background", help="Inputs that fit no label, for the threshold (default: CLINC150's texts)."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base model, where it has moved.")] = None,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Learn your own labels from a few examples of each: any labels, one example or more."""
    import time

    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..learners import learner_class
    from ..runs.adapted import adapt_checkpoint
    from ..runs.adapted_folder import ABOUT, ARRAYS, check_output
    from ..runs.build import checkpoint_file
    from ..runs.loaded import is_regression, kind_of_inputs, read_arrays, stored_config
    from ..tasks.numbers import column_names
    from .examples import background_of, support_of
    from .shown import command

    started = time.perf_counter()
    if steps is not None and steps < 0:
        raise ConfigurationError(f"--steps is {steps}; expected a whole number of at least 0")
    select_device(device)
    config = stored_config(checkpoint_file(checkpoint))
    if steps is not None and not learner_class(config.algorithm).adapts_by_steps:
        raise ConfigurationError(f"--steps: {config.algorithm} adapts in closed form, without steps; leave it out")
    check_output(output, ABOUT, ARRAYS)
    kind, regression = kind_of_inputs(config), is_regression(config)
    columns = column_names(support, regression=regression) if kind == "numbers" else None
    inputs, labels = support_of(support) if kind == "texts" else read_arrays(support, kind, regression=regression)
    off = None
    if background and kind != "texts":
        off = read_arrays(background, kind, labelled=False, columns=columns)[0]
    elif background or none_of_these:
        off = background_of(background, data_dir, kind == "texts")
    adapted = adapt_checkpoint(
        checkpoint, inputs, labels or [], num_steps=steps, background=off, source=base, columns=columns
    )
    adapted.save(output)
    seconds = time.perf_counter() - started
    report = {
        "adapter": str(output),
        "labels": adapted.labels,
        "examples": len(inputs),
        "threshold": adapted.threshold,
        "bytes": sum(file.stat().st_size for file in output.iterdir() if file.is_file()),
        "seconds": round(seconds, 3),
    }
    if json:
        echo_json(report)
        return
    what = f"{len(adapted.labels)} labels" if adapted.labels else "a regression"
    print(f"Learned {what} from {len(inputs)} examples in {seconds:.1f} s: {output} ({report['bytes'] / 1e3:.0f} kB)")
    if adapted.threshold is not None:
        print(f"None of these below a score of {adapted.threshold:.3f}")
    example = {"texts": "texts.csv", "images": "FOLDER", "numbers": "points.csv"}[kind]
    print(f"Use it: {command('predict', adapter=output, input=example)}")

"""`reproduce`: make the table of a paper again, row by row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import DataDir, Device, Output, Seed


def reproduce(
    table: Annotated[str, typer.Argument(help="sinusoid, omniglot, intents, glue or continual.")],
    rows: Annotated[list[str] | None, typer.Argument(help="Rows, such as maml-5 or 'maml-*'; all if none.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few iterations, to see that it runs.")] = False,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the rows' names and stop.")] = False,
    seed: Seed = None,
    data_dir: DataDir = None,
    output: Output = None,
    device: Device = None,
) -> None:
    """Train and evaluate the rows of a table that are not finished yet, and write the table.

    Each row leaves a record; stopped at any moment, the same command goes on from there.
    """
    from ..devices import select_device
    from ..recipes import reproduce as recipes
    from .progress import watch
    from .shown import command, goes_on_by

    found = recipes.load_table(table)
    chosen = found.chosen(rows or ())
    if list_rows:
        for row in chosen:
            print(row.name)
        return
    found.check_seed(chosen, seed or 0)
    select_device(device)
    folder = (output or Path("experiments")) / f"reproduce_{table}{'_quick' if quick else ''}"
    again = command(
        "reproduce", table, *(rows or ()), quick=quick, seed=seed, data_dir=data_dir, output=output, device=device
    )
    for row in chosen:
        print(f"{row.name}: {row.line}, {row.column}", flush=True)
        with goes_on_by(again):
            record = found.run(row, folder, seed=seed or 0, data_dir=data_dir, quick=quick, watch=watch(sys.stdout))
        ours = record["ours"]
        half = "" if ours["ci95"] is None else f" ± {ours['ci95']:.2g}"
        told = "diverged" if ours["mean"] is None else f"{ours['metric']} {ours['mean']:.4g}{half}"
        print(f"{row.name}: {told}", flush=True)
        print(f"table: {found.write(folder)}", flush=True)

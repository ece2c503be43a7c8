"""`report`: the figures and the report of a run, of whatever kind, drawn again."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .options import DataDir, Device, Json, echo_json

# Experiments that are reported from their `results.json` alone: kind → function of the run folder.
REPORTS = {"continual": "continual.report:write", "melpa": "recipes.melpa_report:write"}


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    episodes: Annotated[
        int | None, typer.Option("--episodes", help="Test episodes behind the curves (default: the configuration's).")
    ] = None,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Figures and tables in the run folder; of `continual` and `melpa` from results.json, running nothing."""
    from ..devices import select_device
    from ..runs.report import write_report

    select_device(device)
    draw = _of_results(run)
    if draw:
        page, plots = draw(run)
    else:
        written = write_report(run, episodes=episodes, data_dir=None if data_dir is None else str(data_dir))
        page, plots = written.html, written.plots
    if json:
        echo_json({"report": str(page), "plots": [str(path) for path in plots]})
    else:
        print(f"Report: {page}")
        for path in plots:
            print(f"Plot:   {path}")


def _of_results(run: Path) -> Callable[[Path], tuple[Path, list[Path]]] | None:
    from ..files import read_json

    path = run / "results.json"
    results = read_json(path) if path.is_file() else None
    kind = results.get("experiment") if isinstance(results, dict) else None
    if kind not in REPORTS:
        return None
    module, _, name = REPORTS[kind].partition(":")
    return getattr(import_module(f"..{module}", __package__), name)

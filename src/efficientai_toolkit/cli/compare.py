"""`compare`: what meta-learning brought, against random initialisation and joint pre-training."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .options import Checkpoint, Config, DataDir, Device, Json, Set, echo_json, load_config, overrides


def compare(
    checkpoint: Checkpoint,
    config: Config = None,
    shots: Annotated[
        str, typer.Option("--shots", metavar="1,5,10", help="Numbers of examples K to adapt to.")
    ] = "1,5,10",
    episodes: Annotated[int, typer.Option("--episodes", help="Test episodes.")] = 200,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", help="Steps of joint pre-training (default: as many as meta-training had)."),
    ] = None,
    sets: Set = None,
    data_dir: DataDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """The trained learner against fine-tuning from random weights and from joint pre-training, with a plot."""
    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..recipes.compare import compare_run
    from ..runs.build import checkpoint_file, restore
    from ..runs.evaluate import report_path
    from .evaluate import whole_numbers

    select_device(device)
    ks = whole_numbers(shots, "--shots")
    for flag, value in (("--episodes", episodes), ("--iterations", iterations)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{flag} {value}: expected at least 1")
    path = checkpoint_file(checkpoint)
    found = overrides(sets, data_dir=("paths.data_dir", data_dir))
    built = restore(path, found, None if config is None else load_config(config, found))

    def progress(done: int, of: int) -> None:
        if done == of or done % max(of // 10, 1) == 0:
            print(f"joint pre-training: {done} of {of}", file=sys.stderr)

    folder = report_path(path).parent
    report = compare_run(built, k_shots=ks, episodes=episodes, iterations=iterations, folder=folder, each=progress)
    if json:
        echo_json(report)
        return
    show(report)
    print(f"Report: {folder / 'comparison.json'}")
    print(f"Plot:   {folder / 'plots' / 'comparison.png'}")


def show(report: dict[str, Any]) -> None:
    """A row a K, a column a method; and what meta-learning differs from each by, on the same episodes."""
    from rich.console import Console
    from rich.table import Table

    from ..intervals import difference, interval
    from ..runs.evaluate import seen

    kind, better = ("acc", "above") if report["metric"] == "accuracy" else ("loss", "below")
    steps = "one inner step" if report["inner_steps"] == 1 else f"{report['inner_steps']} inner steps"
    after = f"after {steps}"
    if not report.get("adapts_by_steps", True):
        after = f"({report['algorithm']} adapts in closed form, fine-tuning takes {steps})"
    parts = {
        f"{report['metric']} on {seen(report)} {after}; K: {report['k_counts']}": (report["results"], interval),
        f"meta-learned minus each of the others, on the same episodes; {better} 0 is better": (
            report["differences"],
            difference,
        ),
    }
    console = Console(highlight=False)
    for title, (columns, said) in parts.items():
        table = Table(title=title, title_justify="left")
        table.add_column("K", justify="right")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for k in report["k_shots"]:
            rows = (rows[str(k)] for rows in columns.values())
            table.add_row(str(k), *(said(row[kind], row[f"{kind}_ci95"], percent=kind == "acc") for row in rows))
        console.print(table)

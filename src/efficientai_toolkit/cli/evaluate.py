"""`evaluate`: how well a trained learner adapts to tasks that its training never saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Checkpoint, Config, DataDir, Device, Json, Set, echo_json, overrides


def evaluate(
    checkpoint: Checkpoint,
    config: Config = None,
    episodes: Annotated[int | None, typer.Option("--episodes", help="Test episodes (default: 600).")] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="0,1,5,10", help="Numbers of inner steps to report.")
    ] = None,
    sets: Set = None,
    data_dir: DataDir = None,
    device: Device = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Of the JSON report (default: in the run folder).")
    ] = None,
    json: Json = False,
) -> None:
    """A table with 95 % intervals, and a JSON report; by default on the run's own test tasks."""
    from ..devices import select_device
    from ..runs.evaluate import evaluate_checkpoint
    from .options import load_config

    select_device(device)
    found = overrides(sets, data_dir=("paths.data_dir", data_dir))
    given = None if config is None else load_config(config, found)
    chosen = None if steps is None else whole_numbers(steps, "--steps")
    evaluation = evaluate_checkpoint(
        checkpoint, given, overrides=found, episodes=episodes, steps=chosen, output=report
    ).report
    if json:
        echo_json(evaluation)
    else:
        show(evaluation)


def whole_numbers(text: str, flag: str) -> list[int]:
    """`"0,1,5"` → [0, 1, 5]."""
    from ..errors import ConfigurationError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ConfigurationError(f"{flag} {text!r}: expected whole numbers of at least 0, such as {flag} 1,5,10")
    return numbers


def show(report: Mapping[str, Any]) -> None:
    """The report as a table and a few lines."""
    from rich.console import Console
    from rich.table import Table

    from ..runs.evaluate import seen

    metrics, extrapolated = report["metrics"], set(report["extrapolated_steps"])
    kinds = {
        kind: title
        for kind, title in (("acc", "accuracy"), ("loss", "loss"))
        if f"step_{report['steps'][0]}_{kind}" in metrics
    }
    console = Console()
    title = f"{report['algorithm']}, iteration {report['iteration']}: {seen(report)}"
    table = Table(title=title, title_justify="left")
    table.add_column("inner steps", justify="right")
    for name in kinds.values():
        table.add_column(f"{name} (95 % interval)", justify="right")
    closed = not report["adapts_by_steps"]
    for k in [report["trained_steps"]] if closed else report["steps"]:
        trained = k == report["trained_steps"]
        note = " (trained)" if trained else " (extrapolated)" if f"step_{k}_loss" in extrapolated else ""
        cells = [interval(metrics[f"step_{k}_{kind}"], metrics[f"step_{k}_{kind}_ci95"], kind) for kind in kinds]
        table.add_row("none: in closed form" if closed else f"{k}{note}", *cells, style="bold" if trained else None)
    console.print(table)
    speed = report["adaptation_speed"]
    if speed["steps_to_90_percent"] is not None:
        reached, last = speed["steps_to_90_percent"], speed["of_the_gain_after"]
        console.print(f"90 % of the gain of {last} steps is reached after {reached}.")
    console.print(
        f"Adapting to one task: {1e3 * report['seconds_per_task']:.1f} ms, "
        f"{bytes_of(report['peak_memory_bytes_per_task'])} at the peak, "
        f"{report['trainable_parameters']:,} trainable parameters."
    )
    diverged = report["headline"]["diverged_tasks"]
    if diverged:
        console.print(f"On {diverged} of {report['episodes']} tasks the loss is not finite.")
    if "file" in report:
        console.print(f"Report: {report['file']}", soft_wrap=True)


def bytes_of(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def interval(mean: float | None, ci95: float | None, kind: str) -> str:
    """`87.3 % ± 0.4` for accuracies, `0.335 ± 0.016` for losses, a dash for what is not finite."""
    if mean is None:
        return "–"
    scale, unit, digits = (100, " %", 1) if kind == "acc" else (1, "", 4)
    spread = "" if ci95 is None else f" ± {scale * ci95:.{digits}f}"
    return f"{scale * mean:.{digits}f}{unit}{spread}"

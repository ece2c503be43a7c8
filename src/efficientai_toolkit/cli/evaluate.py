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
    episodes: Annotated[
        int | None, typer.Option("--episodes", help="Test episodes (default: the configuration's).")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="0,1,5,10", help="Numbers of inner steps to report.")
    ] = None,
    sets: Set = None,
    data_dir: DataDir = None,
    device: Device = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Write the JSON report here (default: evaluation.json in the run folder; another checkpoint than the "
            "best, and other settings than the run's own, are part of the name).",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """A table with 95 % intervals, and a JSON report; by default on the run's own test tasks."""
    from ..devices import select_device
    from ..runs.build import checkpoint_file
    from ..runs.evaluate import evaluate_checkpoint, report_path
    from .options import load_config

    select_device(device)
    found = overrides(sets, data_dir=("paths.data_dir", data_dir))
    given = None if config is None else load_config(config, found)
    chosen = None if steps is None else whole_numbers(steps, "--steps")
    path = checkpoint_file(checkpoint)
    if report is None and (other := _other_settings(path, config, episodes, chosen, _measured(sets))):
        own = report_path(path)  # which is kept
        report = own.with_name(f"{own.stem}_{other}.json")
    evaluation = evaluate_checkpoint(
        path, given, overrides=found, episodes=episodes, steps=chosen, output=report
    ).report
    if json:
        echo_json(evaluation)
    else:
        show(evaluation)


_LONGEST = 100  # characters of settings in a file's name


def _measured(sets: list[str] | None) -> list[str]:
    """Of `--set` what changes what is measured, which where the data are does not."""
    return [text for text in sets or () if not text.startswith("paths.")]


def _other_settings(
    checkpoint: Path, config: Path | None, episodes: int | None, steps: list[int] | None, sets: list[str]
) -> str:
    """What an evaluation has other than the run's own, as a part of a file's name; empty where it has nothing."""
    import hashlib
    import re

    from ..checkpoint import read_header
    from ..config import MetaLearningConfig

    changed = [config.stem] if config else []
    stored = read_header(checkpoint).get("config")
    own = MetaLearningConfig.from_dict(stored).evaluation if stored and not config else None
    if episodes is not None and (own is None or episodes != own.episodes):
        changed.append(f"episodes={episodes}")
    if steps is not None and (own is None or set(steps) != set(own.steps)):
        changed.append(f"steps={','.join(map(str, steps))}")
    name = re.sub(r"[^A-Za-z0-9_.,=-]+", "-", "_".join([*changed, *sets]))
    if len(name) <= _LONGEST and not config:
        return name
    whole = repr((config and str(config.resolve()), changed, sets))  # names that are cut alike stay apart
    return f"{name[:_LONGEST]}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


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

    from ..intervals import interval
    from ..runs.evaluate import seen

    metrics, extrapolated = report["metrics"], set(report["extrapolated_steps"])
    kinds = {
        kind: title
        for kind, title in (("acc", "accuracy"), ("loss", "loss"))
        if f"step_{report['steps'][0]}_{kind}" in metrics
    }
    console = Console(highlight=False)
    title = f"{report['algorithm']}, iteration {report['iteration']}: {seen(report)}"
    table = Table(title=title, title_justify="left")
    table.add_column("inner steps", justify="right")
    for name in kinds.values():
        table.add_column(f"{name} (95 % interval)", justify="right")
    closed = not report["adapts_by_steps"]
    for k in [report["trained_steps"]] if closed else report["steps"]:
        trained = k == report["trained_steps"]
        note = " (trained)" if trained else " (extrapolated)" if f"step_{k}_loss" in extrapolated else ""
        cells = [
            interval(metrics[f"step_{k}_{kind}"], metrics[f"step_{k}_{kind}_ci95"], percent=kind == "acc")
            for kind in kinds
        ]
        table.add_row("none: in closed form" if closed else f"{k}{note}", *cells, style="bold" if trained else None)
    console.print(table)
    speed = report["adaptation_speed"]
    if speed["steps_to_90_percent"] is not None:
        reached, last = speed["steps_to_90_percent"], speed["of_the_gain_after"]
        steps = "one step" if reached == 1 else f"{reached} steps"
        console.print(f"90 % of the gain of {last} steps is reached after {steps}.")
    milliseconds = float(f"{1e3 * report['seconds_per_task']:.2g}")  # more digits differ from call to call
    console.print(
        f"Adapting to one task: {milliseconds:g} ms, "
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

